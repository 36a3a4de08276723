// The Python module octavo.kernels._native. Tensors come as addresses: octavo.kernels.cpu has looked at them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using namespace octavo;

namespace {

Matrix matrix(int bits, uintptr_t data, int64_t rows, int64_t cols) {
    return {Format(bits), reinterpret_cast<const uint8_t*>(data), rows, cols};
}

Rows rows(bool bf16, uintptr_t data, int64_t count, int64_t cols) {
    return {bf16 ? Float::bf16 : Float::f32, reinterpret_cast<void*>(data), count, cols};
}

struct Experts {
    std::vector<Expert> list;
};

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int bits, uintptr_t data, int64_t rows, int64_t cols) {
            new (self) Matrix(matrix(bits, data, rows, cols));
        });
    nb::class_<Expert>(m, "Expert").def("__init__", [](Expert* self, const Matrix& w1, const Matrix& w3, const Matrix& w2) {
        new (self) Expert{w1, w3, w2};
    });
    nb::class_<Experts>(m, "Experts").def("__init__", [](Experts* self, nb::list list) {
        new (self) Experts;
        for (const auto& one : list) self->list.push_back(nb::cast<const Expert&>(one));
    });

    m.def("linear", [](bool x_bf16, uintptr_t x, int64_t T, const Matrix& w, bool y_bf16, uintptr_t y) {
        nb::gil_scoped_release unlocked;
        linear(rows(x_bf16, x, T, w.cols), w, rows(y_bf16, y, T, w.rows));
    });
    m.def("moe", [](bool bf16, uintptr_t x, int64_t T, int64_t D, uintptr_t ids, uintptr_t weights, int64_t K,
                    const Experts& experts, uintptr_t y) {
        nb::gil_scoped_release unlocked;
        const auto* chosen = reinterpret_cast<const int64_t*>(ids);
        for (int64_t i = 0; i < T * K; ++i) {
            if (chosen[i] < 0 || chosen[i] >= int64_t(experts.list.size())) throw std::out_of_range("no such expert");
        }
        moe(rows(bf16, x, T, D), chosen, reinterpret_cast<const float*>(weights), K, experts.list, rows(bf16, y, T, D));
    });

    m.def("set_threads", [](int n) {
        nb::gil_scoped_release unlocked;  // it waits for a running operation
        set_threads(n);
    });
    m.def("threads", &threads);
    m.def("available", &available_kernels);
    m.def("choose", &choose_kernels);
    m.def("name", [] { return std::string(kernels().name); });
    m.def("reason", &kernels_reason);
    m.def("read_bandwidth", [](nb::list list) {
        std::vector<Matrix> matrices;
        for (const auto& one : list) matrices.push_back(nb::cast<const Matrix&>(one));
        nb::gil_scoped_release unlocked;
        return read_bandwidth(matrices);
    });
    m.def("dot_peak", [](double seconds) {
        nb::gil_scoped_release unlocked;
        return dot_peak(seconds);
    });
}
