"""A judge in this process: any model that leakfast can load and draw from. Demands the model; costs nothing but
time. For a large one, vLLM's own server and `openai:MODEL --base-url …` are the other way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from leakfast.judge.contract import ERROR, REPLIED, TRUNCATED, Reply, Request
from leakfast.judge.prompt import SYSTEM, user_turn
from leakfast.judge.sdk import Asking


class Local:
    """Draws each reply from a local model, greedily unless a temperature is given."""

    def __init__(self, model: str, asking: Asking, backend: str = "auto"):
        self.model, self.asking, self.backend = model, asking, backend

    def ask_all(self, requests: Sequence[Request]) -> Iterator[list[Reply]]:
        """Replies in lists as they are made; a prompt that does not fit the model's context is an error of its own.

        Raises ModelError for a model that cannot be loaded or drawn from."""
        from leakfast import models
        from leakfast.generation import contract, frames
        from leakfast.generation.generate import complete
        from leakfast.prompts import chat, reasoning

        loaded = models.load(self.model, dtype="bfloat16" if self.model != "organism" else "float32")
        room = loaded.context_tokens or 1 << 30
        fitting, prompts, refused = [], [], []
        for request in requests:
            ids = chat.render(loaded.tokenizer, SYSTEM, user_turn(request.question, request.completion))
            if len(ids) + self.asking.max_tokens > room:
                told = f"{len(ids)} tokens and {self.asking.max_tokens} of reply do not fit into {room}"
                refused.append(Reply(request.key, ERROR, detail=told))
            else:
                fitting.append(request)
                prompts.append(contract.Request(f"judgement {request.key[:8]}", ids, [len(prompts)]))
        if refused:
            yield refused
        if not fitting:
            return
        sampling = contract.Sampling(self.asking.temperature or 0.0, 1.0, self.asking.max_tokens)
        for done in complete(loaded, prompts, sampling, backend=self.backend):
            ids = [c.token_ids for c in done]
            read = reasoning.read(loaded.tokenizer, ids, frames.decode(loaded.tokenizer, ids))
            yield [
                Reply(
                    fitting[c.request].key,
                    TRUNCATED if c.finish_reason == "length" else REPLIED,
                    one.text,
                    c.finish_reason,
                    len(prompts[c.request].ids),
                    len(c.token_ids),
                )
                for c, one in zip(done, read, strict=True)
            ]
