#include "dev.h"

// Turns each head by its position, as rotary position embedding does (Su et al., arXiv 2104.09864): element i of a
// head's first half goes with element i of its second, and (u, v) becomes (u cos - v sin, v cos + u sin), with sin times
// `direction`: 1, or -1 to turn back. addend (if not null) is added.
// x, addend?, out [rows, heads, 2 * half]; table [2, seq, half], cosines and sines; row r has position r % seq. A thread
// takes N pairs, 16 bytes of each half; grid = ceil(pairs / (256 * N)), 256 threads. out may be x or addend.
template <class T> struct rotary_args {
    const T *x, *addend;
    const float* table;
    T* out;
    u32 pairs, seq, heads, half;  // pairs = rows * heads * half
    float direction;
};
template <int N, class T> DEV void turn(const rotary_args<T>& a, u32 pair) {
    const u32 c = pair % a.half, head = pair / a.half, position = head / a.heads % a.seq;
    const size_t first = (size_t)head * 2 * a.half + c, second = first + a.half, angle = (size_t)position * a.half + c;
    float u[N], v[N], cosine[N], sine[N], to_u[N] = {}, to_v[N] = {};
    load<N>(u, a.x + first);
    load<N>(v, a.x + second);
    load_fixed<N>(cosine, a.table + angle);
    load_fixed<N>(sine, a.table + (size_t)a.seq * a.half + angle);
    if (a.addend) {
        load<N>(to_u, a.addend + first);
        load<N>(to_v, a.addend + second);
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        sine[k] *= a.direction;
        to_u[k] += u[k] * cosine[k] - v[k] * sine[k];
        to_v[k] += v[k] * cosine[k] + u[k] * sine[k];
    }
    store<N>(a.out + first, to_u);
    store<N>(a.out + second, to_v);
}
template <class T> DEV void rotary(const rotary_args<T>& a) {
    constexpr int N = Per16<T>::n;
    const u32 pair = (blockIdx.x * 256 + threadIdx.x) * N;
    if (pair >= a.pairs) return;
    if (a.half % N == 0)
        turn<N>(a, pair);
    else
        for (u32 k = pair; k < min(pair + N, a.pairs); k++) turn<1>(a, k);
}
using rotary_f32_args = rotary_args<float>;
using rotary_bf16_args = rotary_args<u16>;
KERNEL(rotary_f32, rotary_f32_args, 256) { rotary(a); }
KERNEL(rotary_bf16, rotary_bf16_args, 256) { rotary(a); }
