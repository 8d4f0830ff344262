#pragma once
#include "dev.h"

// What attention reads and writes, in two forms: packed, with queries, keys and values of each position side by side,
// as many heads of each; and grouped, in three tensors, where each head of keys and values serves heads / kv_heads
// heads of queries that follow each other (Ainslie et al., arXiv 2305.13245). D is the width of a head.
template <class T> struct attention_args {
    static constexpr bool GROUPED = false;
    const T* qkv;  // [batch, seq, 3, heads, D]
    T* out;        // [batch, seq, heads, D]
    float* lse;    // [batch, heads, seq], natural logarithm; may be null
    u32 batch, seq, heads, causal;
    float scale;   // positive
};
template <class T> struct grouped_attention_args {
    static constexpr bool GROUPED = true;
    const T *q, *k, *v;  // [batch, seq, heads, D], [batch, seq, kv_heads, D] twice
    T* out;              // as above, and so on
    float* lse;
    u32 batch, seq, heads, kv_heads, causal;
    float scale;
};
template <class T> struct attention_grad_args {
    static constexpr bool GROUPED = false;
    const T* qkv;      // [batch, seq, 3, heads, D]
    const T* d_out;    // [batch, seq, heads, D]
    const float* lse;  // [batch, heads, seq]
    const float* dot;  // the same
    T* d_qkv;          // [batch, seq, 3, heads, D]: attention_kv_grad writes parts 1 and 2, attention_q_grad part 0
    u32 batch, seq, heads, causal;
    float scale;       // positive
};
template <class T> struct grouped_attention_grad_args {
    static constexpr bool GROUPED = true;
    const T *q, *k, *v;
    const T* d_out;
    const float *lse, *dot;
    T *d_q, *d_k, *d_v;  // as q, k and v
    u32 batch, seq, heads, kv_heads, causal;
    float scale;
};
template <class T> struct attention_dot_args {
    const T* out;    // [batch, seq, heads, D]
    const T* d_out;  // the same
    float* dot;      // [batch, heads, seq]
    u32 batch, seq, heads;
};

// Heads of keys and values, and the heads of queries that each serves.
template <class A> DEV u32 kv_heads(const A& a) {
    if constexpr (A::GROUPED)
        return a.kv_heads;
    else
        return a.heads;
}
template <class A> DEV u32 served(const A& a) {
    if constexpr (A::GROUPED)
        return a.heads / a.kv_heads;
    else
        return 1;
}
// Where queries begin, and their gradients.
template <class A> DEV auto queries(const A& a) {
    if constexpr (A::GROUPED)
        return a.q;
    else
        return a.qkv;
}
template <class A> DEV auto d_queries(const A& a) {
    if constexpr (A::GROUPED)
        return a.d_q;
    else
        return a.d_qkv;
}
// Elements from a position of keys or values to the next.
template <int D, class A> DEV u32 kv_step(const A& a, u32 packed) { return A::GROUPED ? kv_heads(a) * D : packed; }
// The first head of queries that a head of keys and values serves.
template <class A> DEV int first_served(const A& a, int kv_head) {
    if constexpr (A::GROUPED)
        return kv_head * (int)served(a);
    else
        return kv_head;
}
// `packed`, where a head's keys, values or gradients begin at a position in the packed form; in the grouped one, where
// those of the head that serves this one do. Positions are counted through all of a batch.
#define PLACE_OF(name, tensor) \
    template <int D, class T, class A> DEV T* name(const A& a, T* packed, size_t position, int head) { \
        if constexpr (A::GROUPED) \
            return a.tensor + position * (a.kv_heads * D) + (u32)head / served(a) * D; \
        else \
            return packed; \
    }
PLACE_OF(key_place, k)
PLACE_OF(value_place, v)
PLACE_OF(d_key_place, d_k)
PLACE_OF(d_value_place, d_v)
#undef PLACE_OF
