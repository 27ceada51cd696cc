// leakfast._native: numpy arrays in and out of the C++ parts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "choice.hpp"
#include "divergence.hpp"
#include "forest.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Hands a vector's memory to numpy without a copy.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    auto* kept = owner.get();
    py::capsule capsule(owner.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), capsule);
}

py::tuple plan_forest(const Array<std::int32_t>& tokens, const Array<std::int64_t>& offsets,
                      std::int64_t budget) {
    if (tokens.ndim() != 1 || offsets.ndim() != 1 || offsets.size() < 1)
        throw py::value_error("tokens and offsets must have one dimension, offsets at least one entry");
    leakfast::ForestPlan plan;
    {
        py::gil_scoped_release release;
        plan = leakfast::plan_forest(tokens.data(), tokens.size(), offsets.data(), offsets.size() - 1, budget);
    }
    return py::make_tuple(to_numpy(std::move(plan.segment_of)), to_numpy(std::move(plan.tokens)),
                          to_numpy(std::move(plan.positions)), to_numpy(std::move(plan.batch_tokens)),
                          to_numpy(std::move(plan.batch_segments)), to_numpy(std::move(plan.q_offsets)),
                          to_numpy(std::move(plan.k_offsets)), to_numpy(std::move(plan.k_rows)));
}

// float32, or bfloat16 seen as uint16; elements of a row side by side.
leakfast::Rows rows_of(const py::array& matrix, const char* name) {
    const bool whole = py::isinstance<py::array_t<float>>(matrix);
    if (matrix.ndim() != 2 || !(whole || py::isinstance<py::array_t<std::uint16_t>>(matrix)) ||
        (matrix.size() > 0 && matrix.shape(1) > 1 && matrix.strides(1) != matrix.itemsize()))
        throw py::value_error(std::string(name) + " must be rows of float32 or uint16 (bfloat16), contiguous");
    return {matrix.data(), whole ? leakfast::Element::float32 : leakfast::Element::bfloat16, matrix.strides(0)};
}

py::tuple choice_logprobs(const py::array& hidden, const py::array& head, const Array<std::int64_t>& token_ids,
                          int threads, const std::string& path) {
    const leakfast::Rows rows = rows_of(hidden, "hidden"), vocabulary = rows_of(head, "head");
    if (hidden.shape(1) != head.shape(1) || token_ids.ndim() != 2 || token_ids.shape(0) != hidden.shape(0))
        throw py::value_error("hidden must be (N, D), head (V, D) and token_ids (N, C)");
    const leakfast::ChoiceSizes sizes{hidden.shape(0), hidden.shape(1), head.shape(0), token_ids.shape(1)};
    py::array_t<float> logprobs({token_ids.shape(0), token_ids.shape(1)}), lse(token_ids.shape(0));
    float *to_logprobs = logprobs.mutable_data(), *to_lse = lse.mutable_data();
    {
        py::gil_scoped_release release;
        leakfast::choice_logprobs(rows, vocabulary, token_ids.data(), sizes, threads, path, to_logprobs, to_lse);
    }
    return py::make_tuple(logprobs, lse);
}

py::array_t<float> divergences(const py::array& states_p, const py::array& states_q, const py::array& head,
                               int threads, const std::string& path, const std::optional<Array<std::int64_t>>& of) {
    const leakfast::Rows p = rows_of(states_p, "states_p"), q = rows_of(states_q, "states_q");
    const leakfast::Rows vocabulary = rows_of(head, "head");
    const std::int64_t pairs = of ? of->size() : states_p.shape(0);
    if (states_q.shape(0) != pairs || states_p.shape(1) != head.shape(1) || states_q.shape(1) != head.shape(1))
        throw py::value_error("states_p and states_q must be (N, D), or of (N,), and head (V, D)");
    if (of)
        for (std::int64_t i = 0; i < pairs; ++i)
            if (of->data()[i] < 0 || of->data()[i] >= states_p.shape(0))
                throw py::value_error("of must name rows of states_p");
    const leakfast::DivergenceSizes sizes{pairs, states_p.shape(1), head.shape(0)};
    py::array_t<float> out({py::ssize_t{3}, static_cast<py::ssize_t>(sizes.n)});
    float* to = out.mutable_data();
    {
        py::gil_scoped_release release;
        leakfast::divergences(p, q, vocabulary, of ? of->data() : nullptr, sizes, threads, path, to);
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The C++ parts of leakfast: integer and float arrays in and out.";
    m.def("plan_forest", &plan_forest, py::arg("tokens"), py::arg("offsets"), py::arg("budget"),
          "Packed batches of a prefix forest; see leakfast._forest_py.plan_forest for the eight arrays.");
    m.def("choice_logprobs", &choice_logprobs, py::arg("hidden"), py::arg("head"), py::arg("token_ids"),
          py::arg("threads"), py::arg("path") = "",
          "(N, C) log-probabilities and (N,) log-sum-exp, float32; see csrc/choice.hpp. bfloat16 as uint16.");
    m.def("divergences", &divergences, py::arg("states_p"), py::arg("states_q"), py::arg("head"),
          py::arg("threads"), py::arg("path") = "", py::arg("of") = py::none(),
          "(3, N) KL(p‖q), KL(q‖p) and JS, float32, of (N,) the row of p of each row of q; see csrc/divergence.hpp. bfloat16 as uint16.");
    m.def("choice_paths", &leakfast::choice_paths, py::arg("both_bfloat16"),
          "The instruction sets of choice_logprobs and divergences that run here, best first.");
}
