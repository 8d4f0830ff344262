#include "check.h"
#include "../elementwise.cu"

static double gelu(double x, u32 f) {
    const double pi = acos(-1.);
    if (f == 0) return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)));
    if (f == 1) return 0.5 * x * erfc(-x / sqrt(2.));
    if (f == 2) return x > 0 ? x : 0;
    return x / (1 + exp(-x));
}
static double slope(double x, u32 f) {
    const double pi = acos(-1.);
    if (f == 0) {
        double c = sqrt(2 / pi), t = tanh(c * (x + 0.044715 * x * x * x));
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
    }
    if (f == 1) return 0.5 * erfc(-x / sqrt(2.)) + x * exp(-x * x / 2) / sqrt(2 * pi);
    if (f == 2) return x > 0;
    double s = 1 / (1 + exp(-x));
    return s + x * s * (1 - s);
}
template <class T> void test(u32 n) {
    u32 grid = blocks(n, 256 * Per16<T>::n);
    Tensor<T> x(n, 9.f), y(n, 2.f), z(n, 2.f);
    double b = bound<T>(1e-6);
    {
        Tensor<T> out(n);
        RUN(add, T, grid, 1, x.data(), y.data(), out.data(), n);
        compare(named<T>("add"), out, [&](size_t i) { return x.at(i) + y.at(i); }, b, 1e-3);
        Tensor<T> in_place = x.copy();
        RUN(add, T, grid, 1, in_place.data(), y.data(), in_place.data(), n);
        compare(named<T>("add"), in_place, [&](size_t i) { return out.at(i); }, b);
    }
    for (bool with : {false, true}) {
        Tensor<T> out(n);
        RUN(product, T, grid, 1, x.data(), y.data(), with ? z.data() : nullptr, out.data(), n);
        compare(named<T>("product"), out, [&](size_t i) { return x.at(i) * y.at(i) + (with ? z.at(i) : 0); }, b);
    }
    {
        Tensor<T> out(n);
        RUN(scale, T, grid, 1, x.data(), out.data(), n, 0.3f);
        compare(named<T>("scale"), out, [&](size_t i) { return x.at(i) * (double)0.3f; }, b, 1e-6);
    }
    for (u32 f = 0; f < 4; f++) {
        Tensor<T> out(n);
        RUN(activation, T, grid, 1, x.data(), out.data(), n, f);
        compare(named<T>("activation") + " " + std::to_string(f), out, [&](size_t i) { return gelu(x.at(i), f); }, b);
        for (bool with : {false, true}) {
            Tensor<T> dx(n);
            RUN(activation_grad, T, grid, 1, x.data(), y.data(), with ? z.data() : nullptr, dx.data(), n, f);
            compare(
                named<T>("activation_grad") + " " + std::to_string(f), dx,
                [&](size_t i) { return slope(x.at(i), f) * y.at(i) + (with ? z.at(i) : 0); }, bound<T>(2e-6));
        }
    }
}
// Values at which powers overflow must not give NaN.
template <class T> void far() {
    Tensor<T> x(8), dy(8), out(8);
    double values[8] = {0, 1e3, -1e3, 1e20, -1e20, 3e38, -3e38, -100};
    for (int i = 0; i < 8; i++) {
        x.set(i, values[i]);
        dy.set(i, 1);
    }
    for (u32 f = 0; f < 4; f++) {
        RUN(activation, T, 1, 1, x.data(), out.data(), 8, f);
        compare(
            named<T>("activation") + " far from 0", out, [&](size_t i) { return i == 0 || x.at(i) < 0 ? 0 : x.at(i); },
            bound<T>(1e-6));
        RUN(activation_grad, T, 1, 1, x.data(), dy.data(), nullptr, out.data(), 8, f);
        compare(
            named<T>("activation_grad") + " far from 0", out,
            [&](size_t i) { return i == 0 ? (f == 2 ? 0 : 0.5) : x.at(i) > 0; }, bound<T>(1e-6));
    }
}
int main() {
    for (u32 n : {1u, 3u, 4u, 1000u, 1024u, 1025u, 2048u, 5003u}) {
        test<float>(n);
        test<u16>(n);
    }
    far<float>();
    far<u16>();
    for (u32 n : {1u, 1023u, 2048u, 5001u}) {
        Tensor<float> x(n, 100.f), back(n);
        Tensor<u16> out(n);
        cast_f32_bf16_args a{x.data(), out.data(), n};
        emu_cast_f32_bf16(&a, blocks(n, 2048), 1, 1);
        compare("cast_f32_bf16", out, [&](size_t i) { return x.at(i); }, 1. / 256, 0.);
        cast_bf16_f32_args c{out.data(), back.data(), n};
        emu_cast_bf16_f32(&c, blocks(n, 2048), 1, 1);
        compare("cast_bf16_f32", back, [&](size_t i) { return out.at(i); }, 0., 1e-30);
    }
    return report();
}
