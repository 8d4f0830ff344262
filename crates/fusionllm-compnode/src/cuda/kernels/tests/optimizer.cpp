#include "check.h"
#include "../optimizer.cu"

struct Buffers {
    Tensor<float> param, grad, m, v;
    Tensor<u16> copy;
    Tensor<u8> decay;
    explicit Buffers(u32 chunks)
        : param(chunks * 1024, 1.f),
          grad(chunks * 1024, 1.f),
          m(chunks * 1024, 0.1f),
          v(chunks * 1024, 0.1f),
          copy(chunks * 1024),
          decay(chunks * 4) {
        for (size_t i = 0; i < v.count; i++) v.set(i, fabs(v.at(i)));
        for (size_t i = 0; i < decay.count; i++) decay.set(i, i % 3 == 0);
    }
};
static void adam(u32 chunks, bool with) {
    Buffers b(chunks);
    auto p0 = b.param.copy(), g0 = b.grad.copy(), m0 = b.m.copy(), v0 = b.v.copy();
    double beta1 = 0.9f, rest1 = 0.1f, beta2 = 0.99f, rest2 = 0.01f, epsilon = 1e-8f, rate = 0.0123f, root = 1.7f,
           factor = 0.97f, scale = 0.3f;
    adamw_args a{b.param.data(), b.grad.data(),  b.m.data(),   b.v.data(),   with ? b.copy.data() : nullptr,
                 b.decay.data(), chunks,         (float)beta1, (float)rest1, (float)beta2,
                 (float)rest2,   (float)epsilon, (float)rate,  (float)root,  (float)factor,
                 (float)scale};
    emu_adamw(&a, chunks, 1, 1);
    auto m = [&](size_t i) { return m0.at(i) * beta1 + g0.at(i) * scale * rest1; };
    auto v = [&](size_t i) { return v0.at(i) * beta2 + g0.at(i) * scale * g0.at(i) * scale * rest2; };
    compare("adamw m", b.m, m, 1e-6, 0.1);
    compare("adamw v", b.v, v, 1e-6, 1e-3);
    compare(
        "adamw param", b.param,
        [&](size_t i) {
            return p0.at(i) * (b.decay.at(i / 256) != 0 ? factor : 1) - m(i) / (sqrt(v(i)) * root + epsilon) * rate;
        },
        1e-6);
    compare("adamw grad", b.grad, [](size_t) { return 0.; }, 0.);
    if (with) compare("adamw copy", b.copy, [&](size_t i) { return round_to<u16>((float)b.param.at(i)); }, 0.);
}
static void descend(u32 chunks, bool copy, bool velocity) {
    Buffers b(chunks);
    auto p0 = b.param.copy(), g0 = b.grad.copy(), v0 = b.m.copy();
    double lr = 0.01f, momentum = 0.9f, factor = 0.97f, scale = 0.3f;
    sgd_args a{b.param.data(),
               b.grad.data(),
               velocity ? b.m.data() : nullptr,
               copy ? b.copy.data() : nullptr,
               b.decay.data(),
               chunks,
               (float)lr,
               (float)momentum,
               (float)factor,
               (float)scale};
    emu_sgd(&a, chunks, 1, 1);
    auto step = [&](size_t i) { return g0.at(i) * scale + (velocity ? v0.at(i) * momentum : 0); };
    if (velocity) compare("sgd velocity", b.m, step, 1e-6);
    compare(
        "sgd param", b.param,
        [&](size_t i) { return p0.at(i) * (b.decay.at(i / 256) != 0 ? factor : 1) - step(i) * lr; }, 1e-6);
    compare("sgd grad", b.grad, [](size_t) { return 0.; }, 0.);
    if (copy) compare("sgd copy", b.copy, [&](size_t i) { return round_to<u16>((float)b.param.at(i)); }, 0.);
}
int main() {
    for (u32 chunks : {1u, 3u})
        for (bool copy : {false, true}) {
            adam(chunks, copy);
            for (bool velocity : {false, true}) descend(chunks, copy, velocity);
        }
    return report();
}
