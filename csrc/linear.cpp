#include <algorithm>
#include <memory>

#include "activations.h"

namespace octavo {
namespace {

// Some panels of one of the products.
struct Task {
    const Product* product;
    const Activations* in;
    int64_t first, end;
};

std::vector<Task> tasks_of(const std::vector<Product>& products, const std::vector<Activations*>& in, bool many) {
    int64_t nbytes = 0;
    for (const Product& one : products) nbytes += matrix_bytes(one.w->format, one.w->rows, one.w->cols);
    std::vector<Task> tasks;
    for (size_t i = 0; i < products.size(); ++i) {
        const Matrix& w = *products[i].w;
        const int64_t panels = ceil_div(w.rows, kPanelRows);
        const int64_t chunk = many ? kMaxPanels : panels_of_task(panel_bytes(w.format, w.cols), nbytes);
        for (int64_t p = 0; p < panels; p += chunk) tasks.push_back({&products[i], in[i], p, std::min(panels, p + chunk)});
    }
    return tasks;
}

// Every product's input; those of one format have it in common.
std::vector<Activations*> inputs_of(const std::vector<Product>& products, std::vector<std::unique_ptr<Activations>>& made,
                                    const Rows& x, int64_t begin, int64_t tokens) {
    std::vector<Activations*> inputs;
    for (const Product& one : products) {
        const auto fits = [&](const auto& known) { return known->format() == one.w->format; };
        auto found = std::find_if(made.begin(), made.end(), fits);
        if (found == made.end()) {
            found = made.insert(made.end(), std::make_unique<Activations>(one.w->format, tokens, x.cols));
            for_tokens(tokens, [&](int64_t t) { (*found)->set_row(t, x, begin + t); });
        }
        inputs.push_back(found->get());
    }
    return inputs;
}

}  // namespace

void linear(Rows x, const std::vector<Product>& products) {
    const Turn turn;
    Stopwatch watch;
    for (const Product& one : products) watch.read(*one.w);
    for (int64_t begin = 0; begin < x.count; begin += kTokensAtATime) {
        const int64_t tokens = std::min(kTokensAtATime, x.count - begin);
        const bool many = tokens > kDirectTokens;
        arena().reset();
        Workspace space(tokens * kPairRows, many);
        std::vector<std::unique_ptr<Activations>> made;
        const std::vector<Task> tasks = tasks_of(products, inputs_of(products, made, x, begin, tokens), many);
        parallel(int64_t(tasks.size()), [&](int64_t i, int thread) {
            const Task& task = tasks[size_t(i)];
            const Matrix& w = *task.product->w;
            float* out = space.floats(thread);
            for (int64_t p = task.first; p < task.end; p += kMaxPanels) {
                const int n = int(std::min<int64_t>(kMaxPanels, task.end - p));
                const int64_t row = p * kPanelRows, rows = std::min<int64_t>(n * kPanelRows, w.rows - row);
                task.in->times(w, p, n, out, kPairRows, space.span(thread));
                for (int64_t t = 0; t < tokens; ++t) {
                    store_row(task.product->y, begin + t, row, out + t * kPairRows, rows);
                }
            }
        });
    }
}

void linear(Rows x, const Matrix& w, Rows y) { linear(x, {{&w, y}}); }

}  // namespace octavo
