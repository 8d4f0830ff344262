#include "dev.h"
// Updates over all parameters of the device, which lie one after the other in each buffer. Blocks of 256 threads take
// chunks of 1024 parameters; decay has one byte for 256 parameters: 1 where weight decay applies. grid = chunks.

struct Place {
    size_t at;
    float keep;
};
// The thread's four parameters, and what weight decay multiplies them with.
DEV Place place(const u8* decay, float factor) {
    size_t at = (size_t)blockIdx.x * 1024 + threadIdx.x * 4;
    return {at, decay[at / 256] ? factor : 1.f};
}

// AdamW: g = grad * scale; m = m * beta1 + g * rest1; v = v * beta2 + g * g * rest2;
// param = param * (decay ? factor : 1) - m / (sqrt(v) * root + epsilon) * rate; copy (if not null) = bf16 of param;
// grad = 0. The host puts both bias corrections into root and rate, and lr * weight decay into factor.
struct adamw_args {
    float *param, *grad, *m, *v;
    u16* copy;
    const u8* decay;
    u32 chunks;
    float beta1, rest1, beta2, rest2, epsilon, rate, root, factor, scale;
};
KERNEL(adamw, adamw_args, 256) {
    if (blockIdx.x >= a.chunks) return;
    Place p = place(a.decay, a.factor);
    float param[4], grad[4], m[4], v[4], zeros[4] = {};
    load<4>(param, a.param + p.at);
    load<4>(grad, a.grad + p.at);
    load<4>(m, a.m + p.at);
    load<4>(v, a.v + p.at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float g = grad[i] * a.scale;
        m[i] = m[i] * a.beta1 + g * a.rest1;
        v[i] = v[i] * a.beta2 + g * g * a.rest2;
        param[i] = param[i] * p.keep - m[i] / (sqrtf(v[i]) * a.root + a.epsilon) * a.rate;
    }
    store<4>(a.param + p.at, param);
    store<4>(a.m + p.at, m);
    store<4>(a.v + p.at, v);
    store<4>(a.grad + p.at, zeros);
    if (a.copy) store<4>(a.copy + p.at, param);
}

// SGD: g = grad * scale; velocity = velocity * momentum + g; param = param * (decay ? factor : 1) - velocity * lr, or -
// g * lr where velocity is null; copy (if not null) = bf16 of param; grad = 0.
struct sgd_args {
    float *param, *grad, *velocity;
    u16* copy;
    const u8* decay;
    u32 chunks;
    float lr, momentum, factor, scale;
};
KERNEL(sgd, sgd_args, 256) {
    if (blockIdx.x >= a.chunks) return;
    Place p = place(a.decay, a.factor);
    float param[4], step[4], v[4] = {}, zeros[4] = {};
    load<4>(param, a.param + p.at);
    load<4>(step, a.grad + p.at);
    if (a.velocity) load<4>(v, a.velocity + p.at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        step[i] *= a.scale;
        if (a.velocity) step[i] += v[i] * a.momentum;
        param[i] = param[i] * p.keep - step[i] * a.lr;
    }
    store<4>(a.param + p.at, param);
    if (a.velocity) store<4>(a.velocity + p.at, step);
    store<4>(a.grad + p.at, zeros);
    if (a.copy) store<4>(a.copy + p.at, param);
}
