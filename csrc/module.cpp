// The Python module octavo.kernels._native. Tensors come as addresses: octavo.kernels.cpu has looked at them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace octavo;

namespace {

Matrix matrix(int bits, uintptr_t data, int64_t rows, int64_t cols) {
    return {Format(bits), reinterpret_cast<const uint8_t*>(data), rows, cols};
}

Rows rows(bool bf16, uintptr_t data, int64_t count, int64_t cols) {
    return {bf16 ? Float::bf16 : Float::f32, reinterpret_cast<void*>(data), count, cols};
}

Norm weights(bool bf16, uintptr_t data, float eps) {
    return {{bf16 ? Float::bf16 : Float::f32, reinterpret_cast<const void*>(data)}, eps};
}

Routing routing(const std::array<uintptr_t, 3>& to) {
    return {reinterpret_cast<int64_t*>(to[0]), reinterpret_cast<float*>(to[1]), reinterpret_cast<float*>(to[2])};
}

struct Experts {
    std::vector<Expert> list;
};

// Of a segment.
using AsTuple = std::tuple<int, int64_t, uintptr_t, int64_t, int64_t, bool>;

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int bits, uintptr_t data, int64_t rows, int64_t cols) {
            new (self) Matrix(matrix(bits, data, rows, cols));
        })
        .def("__init__", [](Matrix* self, int bits, uintptr_t data, int64_t rows, int64_t cols, int64_t split,
                            uintptr_t tail, std::shared_ptr<Read> data_read, std::shared_ptr<Read> tail_read) {
            new (self) Matrix(matrix(bits, data, rows, cols));
            self->split = split;
            self->tail = reinterpret_cast<const uint8_t*>(tail);
            self->data_read = std::move(data_read);
            self->tail_read = std::move(tail_read);
        }, "bits"_a, "data"_a, "rows"_a, "cols"_a, "split"_a, "tail"_a, "data_read"_a.none(), "tail_read"_a.none());
    nb::class_<Expert>(m, "Expert").def("__init__", [](Expert* self, const Matrix& w1, const Matrix& w3, const Matrix& w2) {
        new (self) Expert{w1, w3, w2};
    });
    nb::class_<Experts>(m, "Experts").def("__init__", [](Experts* self, nb::list list) {
        new (self) Experts;
        for (const auto& one : list) self->list.push_back(nb::cast<const Expert&>(one));
    });

    nb::class_<Attention>(m, "Attention")
        .def("__init__", [](Attention* self, bool bf16, uintptr_t norm, float eps, const Matrix& wq, const Matrix& wk,
                            const Matrix& wv, const Matrix& wo, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim) {
            new (self) Attention{weights(bf16, norm, eps), wq, wk, wv, wo, n_heads, n_kv_heads, head_dim};
        });
    nb::class_<Mixture>(m, "Mixture")
        .def("__init__", [](Mixture* self, bool bf16, uintptr_t norm, float eps, bool gate_bf16, uintptr_t gate, int64_t E,
                            int64_t D, int64_t top_k, const Experts& experts) {
            new (self) Mixture{weights(bf16, norm, eps), rows(gate_bf16, gate, E, D), top_k, experts.list};
        });
    nb::class_<Cache>(m, "Cache")
        .def("__init__", [](Cache* self, uintptr_t k, uintptr_t v, const std::array<int64_t, 4>& strides,
                            int64_t tokens, int64_t end, uintptr_t slots, uintptr_t mask) {
            const auto [layer, row, head, slot] = strides;
            new (self) Cache{reinterpret_cast<uint8_t*>(k), reinterpret_cast<uint8_t*>(v), layer, row, head, slot, tokens,
                             end, reinterpret_cast<const int64_t*>(slots), reinterpret_cast<const bool*>(mask)};
        });

    nb::class_<Read>(m, "Read")
        .def("done", &Read::done)
        .def("wait", [](const Read& self) {
            nb::gil_scoped_release unlocked;
            self.wait();
        })
        .def("failed", [](const Read& self) { return std::tuple(self.error(), self.failed_fd(), self.failed_at()); });
    nb::class_<Reader>(m, "Reader")
        .def(nb::init<int>())
        .def("start", [](Reader& self, nb::list list, bool later) {
            std::vector<Segment> segments;
            for (const auto& one : list) {
                const auto [fd, begin, to, nbytes, needed, direct] = nb::cast<AsTuple>(one);
                segments.push_back({fd, begin, reinterpret_cast<uint8_t*>(to), nbytes, needed, direct});
            }
            auto read = std::make_shared<Read>(segments);
            self.start(read, later);
            return read;
        })
        .def("hurry", &Reader::hurry)
        .def("cancel", [](Reader& self, const std::shared_ptr<Read>& read) {
            nb::gil_scoped_release unlocked;
            self.cancel(read);
        });
    m.def("waited", &waited);
    m.def("touch", [](uintptr_t begin, int64_t nbytes) {
        nb::gil_scoped_release unlocked;
        touch(reinterpret_cast<uint8_t*>(begin), nbytes);
    });
    m.def("populate", [](uintptr_t begin, int64_t nbytes) {
        nb::gil_scoped_release unlocked;
        return populate(reinterpret_cast<uint8_t*>(begin), nbytes);
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
    m.def("moe_part", [](bool bf16, uintptr_t x, int64_t T, int64_t D, uintptr_t ids, uintptr_t weights, int64_t K,
                         nb::list list, uintptr_t y) {
        std::vector<std::pair<int64_t, Expert>> experts;
        for (const auto& one : list) experts.emplace_back(nb::cast<int64_t>(one[0]), nb::cast<const Expert&>(one[1]));
        nb::gil_scoped_release unlocked;
        const auto *chosen = reinterpret_cast<const int64_t*>(ids);
        moe_part(rows(bf16, x, T, D), chosen, reinterpret_cast<const float*>(weights), K, experts, rows(false, y, T, D));
    });
    m.def("route", [](bool bf16, uintptr_t x, int64_t T, bool gate_bf16, uintptr_t gate, int64_t E, int64_t D, int64_t K,
                      uintptr_t ids, uintptr_t weights, uintptr_t logits) {
        nb::gil_scoped_release unlocked;
        route(rows(bf16, x, T, D), rows(gate_bf16, gate, E, D), K, routing({ids, weights, logits}));
    });
    m.def("block", [](const Attention& attention, const Mixture* mixture, bool bf16, uintptr_t x, int64_t T,
                       uintptr_t rotation, const Cache& cache, int64_t layer, uintptr_t y,
                       const std::array<uintptr_t, 3>& seen) {
        nb::gil_scoped_release unlocked;
        const Rows in = rows(bf16, x, T, attention.wq.cols), out = rows(bf16, y, T, attention.wo.rows);
        attend(in, attention, reinterpret_cast<const float*>(rotation), cache, layer, out);
        if (mixture) mix(out, *mixture, routing(seen));
    }, "attention"_a, "mixture"_a.none(), "bf16"_a, "x"_a, "T"_a, "rotation"_a, "cache"_a, "layer"_a, "y"_a,
       "seen"_a);
    m.def("normalize", [](bool bf16, uintptr_t x, int64_t T, int64_t D, uintptr_t norm, float eps, uintptr_t y) {
        nb::gil_scoped_release unlocked;
        normalize(rows(bf16, x, T, D), weights(bf16, norm, eps), rows(bf16, y, T, D));
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
    m.def("spent", [] { return std::pair(spent().seconds, spent().nbytes); });
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
