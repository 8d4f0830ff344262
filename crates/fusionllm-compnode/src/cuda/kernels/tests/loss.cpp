#include "check.h"
#include "../loss.cu"

// masked: the last row takes no part, and the others weigh 0.75.
template <class T>
void test(u32 rows, u32 vocab, float range, bool small, bool filled = true, bool masked = false) {
    u32 stride = filled ? (vocab + 63) / 64 * 64 : vocab;
    float scale = 0.25f, weight = 0.75f;
    auto counts = [&](size_t r) { return !masked || r + 1 < rows; };
    Tensor<T> logits((size_t)rows * stride, range);
    Tensor<int> labels(rows);
    for (u32 r = 0; r < rows; r++) {
        labels.set(r, r == 0 ? vocab - 1 : random_below(vocab));
        for (u32 c = vocab; c < stride; c++) logits.set((size_t)r * stride + c, c % 2 ? NAN : INFINITY);
    }
    if (masked) labels.set(rows - 1, (int)f32_bits(-weight));
    double expected = masked ? weight : scale, times = masked ? (double)weight * rows : 1.;
    std::vector<double> top(rows), sum(rows);
    for (u32 r = 0; r < rows; r++) {
        double m = -1e300, s = 0;
        for (u32 c = 0; c < vocab; c++) m = std::max(m, logits.at((size_t)r * stride + c));
        for (u32 c = 0; c < vocab; c++) s += exp(logits.at((size_t)r * stride + c) - m);
        top[r] = m;
        sum[r] = s;
    }
    for (int kind = 0; kind < 3; kind++) {  // no gradient; apart; over the logits
        Tensor<T> in = logits.copy(), apart((size_t)rows * stride), &grad = kind == 2 ? in : apart;
        Tensor<float> losses(rows);
        T* to = kind ? grad.data() : nullptr;
        if (small)
            RUN(cross_entropy_small, T, rows, 1, in.data(), labels.data(), losses.data(), to, vocab, stride, scale);
        else
            RUN(cross_entropy, T, rows, 1, in.data(), labels.data(), losses.data(), to, vocab, stride, scale);
        std::string name = named<T>(small ? "cross_entropy_small" : "cross_entropy") + (range > 1e3f ? " large" : "");
        if (masked) name += " masked";
        compare(
            name, losses,
            [&](size_t r) {
                return counts(r) ? (top[r] - logits.at(r * stride + labels.at(r)) + log(sum[r])) * times : 0.;
            },
            3e-6);
        if (kind == 0) continue;
        // The parts of the gradient are about scale / vocab or scale; both are to be right.
        compare(
            name + " grad", grad,
            [&](size_t i) {
                u32 r = i / stride, c = i % stride;
                if (c >= vocab || !counts(r)) return 0.;
                return (exp(logits.at(i) - top[r]) / sum[r] - (c == (u32)labels.at(r))) * expected;
            },
            bound<T>(1e-5), 1e-4 * expected);
    }
}
int main() {
    for (u32 vocab : {1u, 2u, 7u, 8u, 63u, 64u, 65u, 257u, 5000u, 8192u}) {
        for (float range : {5.f, 1e4f}) {
            test<float>(2, vocab, range, true);
            test<u16>(2, vocab, range, true);
        }
        for (bool filled : {true, false}) {
            test<float>(2, vocab, 5.f, false, filled);
            test<u16>(2, vocab, 5.f, false, filled);
            test<float>(3, vocab, 5.f, filled, filled, true);
            test<u16>(3, vocab, 5.f, filled, filled, true);
        }
    }
    for (u32 vocab : {50257u, 70001u}) {
        test<float>(2, vocab, 8.f, false);
        test<u16>(2, vocab, 8.f, false);
    }
    test<u16>(1, 50257, 1e30f, false);
    test<float>(1, 50257, 1e38f, false);
    test<float>(1, 20001, 5.f, true);
    test<u16>(1, 20001, 5.f, true);
    return report();
}
