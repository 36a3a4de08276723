// What the machine can do at most, measured with the same threads as the kernels, and where the time went.
#include <atomic>

#include "ops.h"
#include "pool.h"

namespace octavo {
namespace {

constexpr int64_t kChunk = 256 << 10;

double seconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::atomic<double> seconds_spent{0.0};
std::atomic<int64_t> bytes_read{0};

}  // namespace

Stopwatch::~Stopwatch() {
    seconds_spent.fetch_add(seconds_since(begin_), std::memory_order_relaxed);
    bytes_read.fetch_add(nbytes_, std::memory_order_relaxed);
}

Spent spent() { return {seconds_spent, bytes_read}; }

double read_bandwidth(const std::vector<Matrix>& matrices) {
    struct Piece {
        const uint8_t* data;
        int64_t nbytes;
    };
    std::vector<Piece> pieces;
    int64_t total = 0;
    for (const Matrix& m : matrices) {
        const int64_t nbytes = matrix_bytes(m.format, m.rows, m.cols);
        total += nbytes;
        for (int64_t at = 0; at < nbytes; at += kChunk) {
            pieces.push_back({m.data + at, nbytes - at < kChunk ? nbytes - at : kChunk});
        }
    }
    std::atomic<uint64_t> sink{0};
    const auto begin = std::chrono::steady_clock::now();
    parallel(int64_t(pieces.size()), [&](int64_t task, int) {
        const Piece& piece = pieces[size_t(task)];
        sink.fetch_xor(kernels().read(piece.data, piece.nbytes), std::memory_order_relaxed);
    });
    return double(total) / seconds_since(begin);
}

double dot_peak(double seconds) {
    std::atomic<uint64_t> operations{0};
    const auto begin = std::chrono::steady_clock::now();
    parallel(threads(), [&](int64_t, int) {
        int32_t sink[1] = {0};
        uint64_t mine = 0;
        while (seconds_since(begin) < seconds) mine += kernels().dot_peak(20000, sink);
        operations += mine + (sink[0] == 12345);
    });
    return double(operations.load()) / seconds_since(begin);
}

}  // namespace octavo
