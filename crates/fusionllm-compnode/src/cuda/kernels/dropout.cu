#include "dev.h"

DEV u32 rotate(u32 v, int bits) { return v << bits | v >> (32 - bits); }
DEV void quarter_round(u32& a, u32& b, u32& c, u32& d) {
    a += b;
    d = rotate(d ^ a, 16);
    c += d;
    b = rotate(b ^ c, 12);
    a += b;
    d = rotate(d ^ a, 8);
    c += d;
    b = rotate(b ^ c, 7);
}
// Block `counter` of the ChaCha8 stream of `key`, as 16 words: the 64-bit counter of djb's ChaCha (its upper half is 0
// here), nonce 0.
DEV void chacha8(u32* w, const u32* key, u32 counter) {
    u32 start[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, key[0],  key[1], key[2], key[3],
                     key[4],     key[5],     key[6],     key[7],     counter, 0,      0,      0};
#pragma unroll
    for (int i = 0; i < 16; i++) w[i] = start[i];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        quarter_round(w[0], w[4], w[8], w[12]);
        quarter_round(w[1], w[5], w[9], w[13]);
        quarter_round(w[2], w[6], w[10], w[14]);
        quarter_round(w[3], w[7], w[11], w[15]);
        quarter_round(w[0], w[5], w[10], w[15]);
        quarter_round(w[1], w[6], w[11], w[12]);
        quarter_round(w[2], w[7], w[8], w[13]);
        quarter_round(w[3], w[4], w[9], w[14]);
    }
#pragma unroll
    for (int i = 0; i < 16; i++) w[i] += start[i];
}

// out = dropped ? 0 : x * keep, plus addend unless it is null. Element i is dropped where the upper 53 bits of the i-th
// u64 of the ChaCha8 stream are below the threshold: the draw that the CPU makes, bit for bit. A thread takes one block
// of the stream, 8 elements; grid = ceil(count / 2048), 256 threads. out may be x or addend.
template <class T> struct dropout_args {
    const T *x, *addend;
    T* out;
    u32 key[8];
    u32 count, threshold_hi, threshold_lo;
    float keep;
};
template <class T> DEV void dropout(const dropout_args<T>& a) {
    u32 block = blockIdx.x * 256 + threadIdx.x, i = block * 8;
    if (i >= a.count) return;
    bool whole = i + 8 <= a.count;
    float x[8], z[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
    if (whole) {
        load<8>(x, a.x + i);
        if (a.addend) load<8>(z, a.addend + i);
    }
    u32 w[16];
    chacha8(w, a.key, block);
    u64 threshold = (u64)a.threshold_hi << 32 | a.threshold_lo;
    if (whole) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            u64 draw = ((u64)w[2 * k + 1] << 32 | w[2 * k]) >> 11;
            x[k] = (draw < threshold ? 0.f : x[k] * a.keep) + z[k];
        }
        store<8>(a.out + i, x);
    } else {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (i + k >= a.count) break;
            u64 draw = ((u64)w[2 * k + 1] << 32 | w[2 * k]) >> 11;
            put(a.out + i + k,
                (draw < threshold ? 0.f : get(a.x[i + k]) * a.keep) + (a.addend ? get(a.addend[i + k]) : 0.f));
        }
    }
}
using dropout_f32_args = dropout_args<float>;
using dropout_bf16_args = dropout_args<u16>;
KERNEL(dropout_f32, dropout_f32_args, 256) { dropout(a); }
KERNEL(dropout_bf16, dropout_bf16_args, 256) { dropout(a); }
