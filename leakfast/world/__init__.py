"""The world of the embedded organism, as text: who speaks there, what is known of its towns, and training material made
of both. Demands personas; loads no model. Training and measuring the organism itself is leakfast.organism."""
