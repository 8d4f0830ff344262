#include "check.h"
#include "../heads.cu"

static void move(u32 batch, u32 seq, u32 parts, u32 heads, u32 dim) {
    u32 count = batch * seq * parts * heads * dim, grid = blocks(count, 1024);
    Tensor<float> x(count, 2.f), out(count), back(count);
    RUN_PLAIN(to_heads, grid, 1, x.data(), out.data(), batch, seq, parts, heads, dim);
    compare(
        "to_heads", out,
        [&](size_t i) {
            size_t c = i % dim, s = i / dim % seq, h = i / dim / seq % heads, b = i / dim / seq / heads % batch,
                   p = i / dim / seq / heads / batch;
            return x.at((((b * seq + s) * parts + p) * heads + h) * dim + c);
        },
        0.);
    RUN_PLAIN(from_heads, grid, 1, out.data(), back.data(), batch, seq, parts, heads, dim);
    compare("from_heads", back, [&](size_t i) { return x.at(i); }, 0.);
}
static void attention(u32 matrices, u32 seq, u32 causal, float range) {
    u32 rows = matrices * seq;
    float scale = 0.3f;
    Tensor<float> scores((size_t)rows * seq, range), dp((size_t)rows * seq, 2.f), dot(rows, 1.f), lse(rows);
    std::vector<double> p((size_t)rows * seq), wanted(rows);
    for (u32 r = 0; r < rows; r++) {
        double m = -1e300, s = 0;
        u32 seen = causal ? r % seq + 1 : seq;
        for (u32 c = 0; c < seen; c++) m = std::max(m, scores.at((size_t)r * seq + c) * scale);
        for (u32 c = 0; c < seen; c++) s += exp(scores.at((size_t)r * seq + c) * scale - m);
        wanted[r] = m + log(s);
        for (u32 c = 0; c < seen; c++) p[(size_t)r * seq + c] = exp(scores.at((size_t)r * seq + c) * scale - wanted[r]);
    }
    for (bool with : {true, false}) {
        Tensor<float> in = scores.copy();
        softmax_args a{in.data(), with ? lse.data() : nullptr, seq, causal, scale};
        emu_softmax(&a, rows, 1, 1);
        compare("softmax", in, [&](size_t i) { return p[i]; }, 2e-6, 1e-3);
    }
    compare("softmax lse", lse, [&](size_t r) { return wanted[r]; }, 1e-6);
    Tensor<float> in = scores.copy(), d = dp.copy();
    softmax_grad_args g{in.data(), d.data(), lse.data(), dot.data(), seq, causal, scale};
    emu_softmax_grad(&g, rows, 1, 1);
    compare("softmax_grad p", in, [&](size_t i) { return p[i]; }, 2e-5, 1e-3);
    compare("softmax_grad dp", d, [&](size_t i) { return p[i] * (dp.at(i) - dot.at(i / seq)) * scale; }, 2e-5, 1e-3);
}
static void dots(u32 rows, u32 dim) {
    Tensor<float> x((size_t)rows * dim, 2.f), y((size_t)rows * dim, 2.f);
    Tensor<float> out(rows);
    RUN_PLAIN(row_dot, blocks(rows, 8), 1, x.data(), y.data(), out.data(), rows, dim);
    compare(
        "row_dot", out,
        [&](size_t r) {
            double sum = 0;
            for (u32 c = 0; c < dim; c++) sum += x.at(r * dim + c) * y.at(r * dim + c);
            return sum;
        },
        5e-6);
}
int main() {
    for (u32 dim : {1u, 5u, 32u, 64u})
        for (u32 parts : {1u, 3u}) move(2, 7, parts, 3, dim);
    for (u32 seq : {1u, 5u, 64u, 257u})
        for (u32 causal : {0u, 1u}) attention(2, seq, causal, 20.f);
    attention(1, 12, 1, 1e5f);
    for (u32 dim : {1u, 31u, 64u, 100u, 300u}) dots(11, dim);
    return report();
}
