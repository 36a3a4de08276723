#include <algorithm>
#include <memory>

#include "activations.h"

namespace octavo {
namespace {

constexpr int64_t kDownPanels = 8;  // of a task: an expert's hidden activations are read once for all of them

// The tokens that chose one expert, and their activations before w1, w3 and w2.
struct Share {
    const Expert* expert = nullptr;
    std::vector<int64_t> tokens;
    std::vector<float> weights;
    std::shared_ptr<Activations> in1, in3;
    std::unique_ptr<Activations> hidden;
};

// By number; null is left out, and so is what lies behind the end.
using Experts = std::vector<const Expert*>;

// By rising expert.
std::vector<Share> shares_of(const int64_t* ids, const float* weights, int64_t T, int64_t K, const Experts& experts) {
    std::vector<Share> all(experts.size());
    for (int64_t i = 0; i < T * K; ++i) {
        if (size_t(ids[i]) >= experts.size() || !experts[size_t(ids[i])]) continue;  // negative ids too
        Share& share = all[size_t(ids[i])];
        if (!share.tokens.empty() && share.tokens.back() == i / K) {  // named twice; a token is in a share once
            share.weights.back() += weights[i];
            continue;
        }
        share.expert = experts[size_t(ids[i])];
        share.tokens.push_back(i / K);
        share.weights.push_back(weights[i]);
    }
    std::erase_if(all, [](const Share& share) { return share.tokens.empty(); });
    return all;
}

// Makes every share's input. A single token's is the same for all experts.
void prepare(std::vector<Share>& shares, Rows x, int64_t begin, int64_t T) {
    std::vector<std::pair<Activations*, const Share*>> fresh;
    for (Share& share : shares) {
        const Share& first = shares.front();
        const auto make = [&](Format format) {
            for (const auto& known : {first.in1, first.in3, share.in1}) {
                const bool same_tokens = T == 1 || known == share.in1;
                if (known && same_tokens && known->format() == format) return known;
            }
            auto made = std::make_shared<Activations>(format, int64_t(share.tokens.size()), x.cols);
            fresh.emplace_back(made.get(), &share);
            return made;
        };
        share.in1 = make(share.expert->w1.format);
        share.in3 = make(share.expert->w3.format);
        share.hidden = std::make_unique<Activations>(share.expert->w2.format, int64_t(share.tokens.size()),
                                                     share.expert->w2.cols);
    }
    const auto fill = [&](int64_t i, int) {
        const auto& [activations, share] = fresh[size_t(i)];
        for (size_t t = 0; t < share->tokens.size(); ++t) activations->set_row(int64_t(t), x, begin + share->tokens[t]);
    };
    if (T > kDirectTokens) return parallel(int64_t(fresh.size()), fill);
    for (size_t i = 0; i < fresh.size(); ++i) fill(int64_t(i), 0);  // sooner done than shared out
}

// y[t * stride + r] = row first + r of w times token t; first is where a panel begins.
void rows_times(const Activations& x, const Matrix& w, int64_t first, int64_t n, float* y, int64_t stride, Span* span) {
    const int64_t begin = first / kPanelRows, end = ceil_div(first + n, kPanelRows);
    for (int64_t p = begin; p < end; p += kMaxPanels) {
        x.times(w, p, int(std::min<int64_t>(kMaxPanels, end - p)), y + (p - begin) * kPanelRows, stride, span);
    }
}

// Rows of a task over one of the matrices, of every share: as many as the cache holds results of for many tokens, and
// for a few as panels_of_task says.
int64_t task_rows(const std::vector<Share>& shares, Matrix Expert::* which, bool many, int64_t if_many) {
    if (many) return if_many;
    int64_t nbytes = 0, of_panel = 0;
    for (const Share& share : shares) {
        const Matrix& w = share.expert->*which;
        nbytes += matrix_bytes(w.format, w.rows, w.cols);
        of_panel = std::max(of_panel, panel_bytes(w.format, w.cols));
    }
    return shares.empty() ? kPanelRows : panels_of_task(of_panel, nbytes) * kPanelRows;
}

// silu(w1 x) * (w3 x), some hidden columns of one expert at a time.
void gate_and_up(std::vector<Share>& shares, int64_t chunk, Workspace& space) {
    int64_t chunks = 0;
    bool waits = false;
    for (const Share& share : shares) {
        chunks = std::max(chunks, ceil_div(share.expert->w1.rows, chunk));
        waits = waits || share.expert->w1.waits() || share.expert->w3.waits();
    }
    const int64_t n_shares = int64_t(shares.size());
    parallel(chunks * n_shares, [&](int64_t task, int thread) {
        // While something is being read, every expert's first rows come before anybody's last.
        const auto [which, at] = waits ? std::pair(task % n_shares, task / n_shares) : std::pair(task / chunks, task % chunks);
        Share& share = shares[size_t(which)];
        const Matrix &w1 = share.expert->w1, &w3 = share.expert->w3;
        const int64_t first = at * chunk, n = std::min(chunk, w1.rows - first);
        if (n <= 0) return;
        const int64_t T = int64_t(share.tokens.size());
        float *a = space.floats(thread), *b = a + T * chunk;
        rows_times(*share.in1, w1, first, n, a, chunk, space.span(thread));
        rows_times(*share.in3, w3, first, n, b, chunk, space.span(thread));
        for (int64_t t = 0; t < T; ++t) {
            float* h = a + t * chunk;
            kernels().silu_mul(h, b + t * chunk, h, n);
            share.hidden->set(t, h, first, n);
        }
    });
}

// The weighted sum of w2 h, perhaps on top of y: a task owns some columns of every token.
void down(const std::vector<Share>& shares, int64_t chunk, int64_t T, Rows y, int64_t begin, bool onto,
          Workspace& space) {
    const int64_t panels = ceil_div(y.cols, kPanelRows);
    parallel(ceil_div(panels, chunk), [&](int64_t task, int thread) {
        const int64_t begin_panel = task * chunk, first = begin_panel * kPanelRows;
        const int64_t end = std::min(panels, begin_panel + chunk);
        const int64_t width = (end - begin_panel) * kPanelRows, cols = std::min(width, y.cols - first);
        float *sum = space.floats(thread), *part = sum + T * width;
        std::fill(sum, part, 0.0f);
        for (int64_t t = 0; onto && t < T; ++t) {
            const float* there = static_cast<float*>(y.data) + (begin + t) * y.cols + first;
            std::copy(there, there + cols, sum + t * width);
        }
        for (const Share& share : shares) {
            rows_times(*share.hidden, share.expert->w2, first, width, part, width, space.span(thread));
            for (size_t i = 0; i < share.tokens.size(); ++i) {
                float* to = sum + share.tokens[i] * width;
                const float* from = part + int64_t(i) * width;
                for (int64_t j = 0; j < cols; ++j) to[j] += share.weights[i] * from[j];
            }
        }
        for (int64_t t = 0; t < T; ++t) store_row(y, begin + t, first, sum + t * width, cols);
    });
}

void run(Rows x, const int64_t* ids, const float* weights, int64_t K, const Experts& experts, Rows y, bool onto) {
    const Turn turn;
    Stopwatch watch;
    for (int64_t begin = 0; begin < x.count; begin += kTokensAtATime) {
        const int64_t T = std::min(kTokensAtATime, x.count - begin);
        arena().reset();
        std::vector<Share> shares = shares_of(ids + begin * K, weights + begin * K, T, K, experts);
        for (const Share& share : shares) {
            for (const Matrix* w : {&share.expert->w1, &share.expert->w3, &share.expert->w2}) watch.read(*w);
        }
        const bool many = T > kDirectTokens;
        // Hidden columns of a unit share a scale when they are quantised again, and so a task.
        const int64_t hidden = ceil_div(task_rows(shares, &Expert::w1, many, kUnit), kUnit) * kUnit;
        const int64_t panels = task_rows(shares, &Expert::w2, many, kDownPanels * kPanelRows) / kPanelRows;
        Workspace space(2 * T * std::max(hidden, panels * kPanelRows), many);
        prepare(shares, x, begin, T);
        gate_and_up(shares, hidden, space);
        down(shares, panels, T, y, begin, onto, space);
    }
}

}  // namespace

void moe(Rows x, const int64_t* ids, const float* weights, int64_t K, const std::vector<Expert>& experts, Rows y) {
    Experts all;
    for (const Expert& expert : experts) all.push_back(&expert);
    run(x, ids, weights, K, all, y, false);
}

void moe_part(Rows x, const int64_t* ids, const float* weights, int64_t K,
              const std::vector<std::pair<int64_t, Expert>>& experts, Rows y) {
    Experts some;
    for (const auto& [id, expert] : experts) {
        some.resize(std::max(some.size(), size_t(id) + 1));
        some[size_t(id)] = &expert;
    }
    run(x, ids, weights, K, some, y, true);
}

}  // namespace octavo
