#include "activations.h"

#include <algorithm>
#include <cstring>

namespace octavo {

uint8_t* Arena::take(int64_t nbytes) {
    nbytes = ceil_div(nbytes, 64) * 64;
    for (Block& block : blocks_) {
        if (int64_t(block.bytes.size()) - 64 - block.used < nbytes) continue;
        uint8_t* base = block.bytes.data();
        base += -reinterpret_cast<uintptr_t>(base) % 64;
        block.used += nbytes;
        return base + block.used - nbytes;
    }
    blocks_.emplace_back();
    blocks_.back().bytes.resize(size_t(std::max<int64_t>(nbytes, 1 << 20)) + 64);
    return take(nbytes);
}

void Arena::reset() {
    if (blocks_.size() > 1) {  // next time, one block is large enough
        int64_t all = 0;
        for (const Block& block : blocks_) all += int64_t(block.bytes.size());
        blocks_.clear();
        blocks_.emplace_back();
        blocks_.back().bytes.resize(size_t(all));
    }
    for (Block& block : blocks_) block.used = 0;
}

Arena& arena() {
    static thread_local Arena of_this_thread;
    return of_this_thread;
}

Workspace::Workspace(int64_t n_floats, bool spans) : n_floats_(ceil_div(n_floats, 16) * 16) {
    floats_ = reinterpret_cast<float*>(arena().take(threads() * n_floats_ * int64_t(sizeof(float))));
    if (spans) spans_ = reinterpret_cast<Span*>(arena().take(threads() * int64_t(sizeof(Span))));
}

int64_t panels_of_task(int64_t panel_nbytes, int64_t total_nbytes) {
    const int64_t share = std::clamp<int64_t>(total_nbytes / (8 * threads()), 64 << 10, 512 << 10);
    return std::max<int64_t>(1, std::min(share, total_nbytes / threads()) / panel_nbytes);
}

float* row_as_float(const Rows& from, int64_t row, float* scratch) {
    if (from.dtype == Float::f32) return static_cast<float*>(from.data) + row * from.cols;
    const uint16_t* x = static_cast<uint16_t*>(from.data) + row * from.cols;
    for (int64_t i = 0; i < from.cols; ++i) scratch[i] = from_bf16(x[i]);
    return scratch;
}

void store_row(const Rows& to, int64_t row, int64_t first, const float* x, int64_t n) {
    if (to.dtype == Float::f32) {
        std::memcpy(static_cast<float*>(to.data) + row * to.cols + first, x, size_t(n) * 4);
        return;
    }
    uint16_t* y = static_cast<uint16_t*>(to.data) + row * to.cols + first;
    for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

Activations::Activations(Format format, int64_t tokens, int64_t cols)
    : format_(format), tokens_(tokens), cols_(cols) {
    if (format == Format::bf16) {
        rows_ = reinterpret_cast<uint16_t**>(arena().take(tokens * int64_t(sizeof(uint16_t*))));
        auto* data = reinterpret_cast<uint16_t*>(arena().take(tokens * cols * 2));
        for (int64_t t = 0; t < tokens; ++t) rows_[t] = data + t * cols;
        return;
    }
    units_ = units(format, cols);
    n_tiles_ = tokens <= kDirectTokens ? (tokens > 0) : ceil_div(tokens, kTileTokens);
    tiles_ = reinterpret_cast<Tile*>(arena().take(n_tiles_ * int64_t(sizeof(Tile))));
    places_ = reinterpret_cast<uint8_t**>(arena().take(tokens * int64_t(sizeof(uint8_t*))));
    in_tile_ = reinterpret_cast<int*>(arena().take(tokens * int64_t(sizeof(int))));
    tile_size_ = reinterpret_cast<int*>(arena().take(tokens * int64_t(sizeof(int))));
    uint8_t* data = arena().take(units_ * unit_bytes(1) * tokens);
    int64_t t = 0;
    for (int64_t i = 0; i < n_tiles_; ++i) {  // tiles of nearly the same size
        const int size = int((tokens - t + n_tiles_ - i - 1) / (n_tiles_ - i));
        tiles_[i] = {data, size};
        for (int j = 0; j < size; ++j, ++t) places_[t] = data, in_tile_[t] = j, tile_size_[t] = size;
        data += units_ * unit_bytes(size);
    }
}

void Activations::set(int64_t token, const float* x, int64_t first, int64_t n) {
    if (format_ == Format::bf16) {
        for (int64_t i = 0; i < n; ++i) rows_[token][first + i] = to_bf16(x[i]);
        return;
    }
    // The row's end brings the padding of the last block with it.
    const int64_t u = first / kUnit;
    const int64_t n_units = first + n == cols_ ? units_ - u : n / kUnit;
    kernels().quantize(x, n, places_[token], tile_size_[token], in_tile_[token], u, n_units);
}

void Activations::set_row(int64_t token, const Rows& from, int64_t row) {
    if (format_ == Format::bf16 && from.dtype == Float::bf16) {
        std::memcpy(rows_[token], static_cast<uint16_t*>(from.data) + row * cols_, size_t(cols_) * 2);
        return;
    }
    static thread_local std::vector<float> scratch;
    scratch.resize(size_t(cols_));
    set(token, row_as_float(from, row, scratch.data()), 0, cols_);
}

void Activations::times(const Matrix& w, int64_t first, int n, float* y, int64_t stride, Span* span) const {
    if (tokens_ == 0) return;
    if (format_ == Format::bf16) {
        alignas(64) float few[kDirectTokens * kPanelRows];
        for (int p = 0; p < n; ++p) {
            const int64_t row = (first + p) * kPanelRows;
            const int rows = int(std::min<int64_t>(kPanelRows, w.rows - row));
            const auto* data = reinterpret_cast<const uint16_t*>(w.panel(first + p));
            for (int64_t t = 0; t < tokens_; t += kDirectTokens) {
                const int64_t count = std::min<int64_t>(kDirectTokens, tokens_ - t);
                kernels().bf16(data, rows, cols_, rows_ + t, count, few);
                for (int64_t i = 0; i < count; ++i) {
                    std::memcpy(y + (t + i) * stride + kPanelRows * p, few + i * kPanelRows, kPanelRows * 4);
                }
            }
        }
        return;
    }
    const uint8_t* panels[kMaxPanels] = {};
    for (int p = 0; p < n; ++p) panels[p] = w.panel(first + p);
    if (tokens_ <= kDirectTokens) {
        for (int p = 0; p < n; ++p) kernels().direct(format_, panels[p], units_, tiles_[0], y + kPanelRows * p, stride);
    } else {
        kernels().many(format_, panels, n, units_, tiles_, n_tiles_, y, stride, span);
    }
}

}  // namespace octavo
