#include <algorithm>

#include "activations.h"
#include "pool.h"

namespace octavo {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // of weights: long enough to stream, short enough to share out evenly

}  // namespace

void linear(Rows x, const Matrix& w, Rows y) {
    const Turn turn;
    for (int64_t begin = 0; begin < x.count; begin += kTokensAtATime) {
        const int64_t tokens = std::min(kTokensAtATime, x.count - begin);
        arena().reset();
        const bool many = tokens > kDirectTokens;
        Workspace space(tokens * kPairRows, many);
        Activations in(w.format, tokens, w.cols);
        const auto fill = [&](int64_t t, int) { in.set_row(t, x, begin + t); };
        if (many) {
            parallel(tokens, fill);
        } else {  // sooner done than shared out
            for (int64_t t = 0; t < tokens; ++t) fill(t, 0);
        }

        const int64_t panels = ceil_div(w.rows, kPanelRows);
        int64_t chunk = many ? kMaxPanels : kTaskBytes / panel_bytes(w.format, w.cols);
        chunk = std::clamp<int64_t>(chunk, 1, ceil_div(panels, threads()));
        parallel(ceil_div(panels, chunk), [&](int64_t task, int thread) {
            float* out = space.floats(thread);
            const int64_t end = std::min(panels, (task + 1) * chunk);
            for (int64_t p = task * chunk; p < end; p += kMaxPanels) {
                const int n = int(std::min<int64_t>(kMaxPanels, end - p));
                const int64_t row = p * kPanelRows, rows = std::min<int64_t>(n * kPanelRows, w.rows - row);
                in.times(w, p, n, out, kPairRows, space.span(thread));
                for (int64_t t = 0; t < tokens; ++t) store_row(y, begin + t, row, out + t * kPairRows, rows);
            }
        });
    }
}

}  // namespace octavo
