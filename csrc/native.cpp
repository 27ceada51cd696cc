// leakfast._native: numpy arrays in and out of the C++ parts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

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

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The C++ parts of leakfast: integer and float arrays in and out.";
    m.def("plan_forest", &plan_forest, py::arg("tokens"), py::arg("offsets"), py::arg("budget"),
          "Packed batches of a prefix forest; see leakfast._forest_py.plan_forest for the eight arrays.");
}
