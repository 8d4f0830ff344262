#include "dev.h"
// Kernels without reductions. A thread takes 16 bytes of T, N neighbours; a block of 256 threads 1024 elements of f32,
// 2048 of bf16 and of casts; grid = ceil(count / that). More blocks do no harm. An output may be one of the inputs.

template <int N> DEV u32 first_place() { return (blockIdx.x * 256 + threadIdx.x) * N; }
template <int N, class T> DEV void load_some(float* v, const T* p, u32 i, u32 count) {
    if (i + N <= count)
        load<N>(v, p + i);
    else
        for (int k = 0; k < N; k++) v[k] = i + k < count ? get(p[i + k]) : 0.f;
}
template <int N, class T> DEV void store_some(T* p, const float* v, u32 i, u32 count) {
    if (i + N <= count)
        store<N>(p + i, v);
    else
        for (int k = 0; k < N; k++)
            if (i + k < count) put(p + i + k, v[k]);
}

// out = a + b
template <class T> struct add_args {
    const T *a, *b;
    T* out;
    u32 count;
};
template <class T> DEV void add(const add_args<T>& a) {
    constexpr int N = Per16<T>::n;
    u32 i = first_place<N>();
    if (i >= a.count) return;
    float x[N], y[N];
    load_some<N>(x, a.a, i, a.count);
    load_some<N>(y, a.b, i, a.count);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] += y[k];
    store_some<N>(a.out, x, i, a.count);
}
using add_f32_args = add_args<float>;
using add_bf16_args = add_args<u16>;
KERNEL(add_f32, add_f32_args, 256) { add(a); }
KERNEL(add_bf16, add_bf16_args, 256) { add(a); }

// out = a * b, plus addend unless it is null
template <class T> struct product_args {
    const T *a, *b, *addend;
    T* out;
    u32 count;
};
template <class T> DEV void product(const product_args<T>& a) {
    constexpr int N = Per16<T>::n;
    u32 i = first_place<N>();
    if (i >= a.count) return;
    float x[N], y[N], z[N] = {};
    load_some<N>(x, a.a, i, a.count);
    load_some<N>(y, a.b, i, a.count);
    if (a.addend) load_some<N>(z, a.addend, i, a.count);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = x[k] * y[k] + z[k];
    store_some<N>(a.out, x, i, a.count);
}
using product_f32_args = product_args<float>;
using product_bf16_args = product_args<u16>;
KERNEL(product_f32, product_f32_args, 256) { product(a); }
KERNEL(product_bf16, product_bf16_args, 256) { product(a); }

// out = x * factor
template <class T> struct scale_args {
    const T* x;
    T* out;
    u32 count;
    float factor;
};
template <class T> DEV void scale(const scale_args<T>& a) {
    constexpr int N = Per16<T>::n;
    u32 i = first_place<N>();
    if (i >= a.count) return;
    float x[N];
    load_some<N>(x, a.x, i, a.count);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] *= a.factor;
    store_some<N>(a.out, x, i, a.count);
}
using scale_f32_args = scale_args<float>;
using scale_bf16_args = scale_args<u16>;
KERNEL(scale_f32, scale_f32_args, 256) { scale(a); }
KERNEL(scale_bf16, scale_bf16_args, 256) { scale(a); }

// 1 / (1 + e^-v). Where e^-v is infinite it is 0.
template <class T> DEV float sigmoid(float v) {
    if constexpr (sizeof(T) == 2)
        return __fdividef(1.f, 1.f + __expf(-v));
    else
        return 1.f / (1.f + expf(-v));
}
enum { GELU_TANH = 0, GELU_ERF = 1, RELU = 2, SILU = 3 };
// GELU by tanh is x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3): no cancellation far below zero.
template <class T> DEV float activation(float x, u32 function) {
    if (function == GELU_TANH) return x * sigmoid<T>(1.5957691216f * (x + 0.044715f * x * x * x));
    if (function == GELU_ERF) return 0.5f * x * (1.f + erff(0.70710678118f * x));
    if (function == RELU) return fmaxf(x, 0.f);
    return x * sigmoid<T>(x);
}
// Its derivative. x is clamped where x^3 would overflow and make inf * 0; the derivative is 0 or 1 there.
template <class T> DEV float activation_slope(float x, u32 function) {
    if (function == RELU) return x > 0.f ? 1.f : 0.f;
    x = fminf(fmaxf(x, -1e4f), 1e4f);
    if (function == GELU_ERF)
        return 0.5f * (1.f + erff(0.70710678118f * x)) + 0.39894228040f * x * exp_for<T>(-0.5f * x * x);
    bool tanh = function == GELU_TANH;
    float z = tanh ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
    float inner = tanh ? 1.5957691216f + 0.21406164f * x * x : 1.f;
    float e = exp_for<T>(-fabsf(z)), r = 1.f / (1.f + e);  // sigmoid(|z|) is r, sigmoid'(z) is e r^2
    return (z > 0.f ? r : e * r) + x * e * r * r * inner;
}

// out = f(x); function: 0 GELU by tanh, 1 GELU by erf, 2 ReLU, 3 SiLU
template <class T> struct activation_args {
    const T* x;
    T* out;
    u32 count;
    u32 function;
};
template <class T> DEV void activate(const activation_args<T>& a) {
    constexpr int N = Per16<T>::n;
    u32 i = first_place<N>();
    if (i >= a.count) return;
    float x[N];
    load_some<N>(x, a.x, i, a.count);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = activation<T>(x[k], a.function);
    store_some<N>(a.out, x, i, a.count);
}
using activation_f32_args = activation_args<float>;
using activation_bf16_args = activation_args<u16>;
KERNEL(activation_f32, activation_f32_args, 256) { activate(a); }
KERNEL(activation_bf16, activation_bf16_args, 256) { activate(a); }

// dx = dy * f'(x), plus addend unless it is null
template <class T> struct activation_grad_args {
    const T *x, *dy, *addend;
    T* dx;
    u32 count;
    u32 function;
};
template <class T> DEV void activation_grad(const activation_grad_args<T>& a) {
    constexpr int N = Per16<T>::n;
    u32 i = first_place<N>();
    if (i >= a.count) return;
    float x[N], y[N], z[N] = {};
    load_some<N>(x, a.x, i, a.count);
    load_some<N>(y, a.dy, i, a.count);
    if (a.addend) load_some<N>(z, a.addend, i, a.count);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = y[k] * activation_slope<T>(x[k], a.function) + z[k];
    store_some<N>(a.dx, x, i, a.count);
}
using activation_grad_f32_args = activation_grad_args<float>;
using activation_grad_bf16_args = activation_grad_args<u16>;
KERNEL(activation_grad_f32, activation_grad_f32_args, 256) { activation_grad(a); }
KERNEL(activation_grad_bf16, activation_grad_bf16_args, 256) { activation_grad(a); }

// out = x, in the other storage type
template <class From, class To> struct cast_args {
    const From* x;
    To* out;
    u32 count;
};
template <class From, class To> DEV void cast(const cast_args<From, To>& a) {
    constexpr int N = 8;
    u32 i = first_place<N>();
    if (i >= a.count) return;
    float x[N];
    load_some<N>(x, a.x, i, a.count);
    store_some<N>(a.out, x, i, a.count);
}
using cast_f32_bf16_args = cast_args<float, u16>;
using cast_bf16_f32_args = cast_args<u16, float>;
KERNEL(cast_f32_bf16, cast_f32_bf16_args, 256) { cast(a); }
KERNEL(cast_bf16_f32, cast_bf16_f32_args, 256) { cast(a); }
