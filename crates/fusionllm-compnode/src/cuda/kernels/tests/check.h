#pragma once
// What the tests of kernels share. Each test program is built by
//   g++ -O2 -std=c++17 -DEMU -Wno-unknown-pragmas -I.. NAME.cpp && ./a.out
// and ends with 1 if an error passes its bound. EMU_SEED=n changes the order in which threads run.
#include "../dev.h"
#include <string>

inline u32 random_state = 1;
inline float uniform() {  // -1 .. 1
    random_state = random_state * 1664525u + 1013904223u;
    return (float)(random_state >> 8) / (1 << 23) - 1.f;
}
inline u32 random_below(u32 n) { return (u32)((uniform() + 1.f) * 0.5f * n) % n; }

// A tensor at an address divisible by 256 as in the arena, NaN before it is written, with bytes behind it that nothing
// may change.
template <class T> struct Tensor {
    size_t count;
    std::shared_ptr<char> memory;
    static constexpr size_t GUARD = 256;
    explicit Tensor(size_t n, float range = 0.f) : count(n) {
        size_t bytes = (n * sizeof(T) + GUARD + 255) / 256 * 256;
        memory.reset((char*)aligned_alloc(256, bytes), free);
        memset(memory.get(), 0xff, bytes);
        memset(memory.get() + n * sizeof(T), 0x5a, GUARD);
        if (range != 0.f)
            for (size_t i = 0; i < n; i++) set(i, range * uniform());
    }
    T* data() const { return (T*)memory.get(); }
    double at(size_t i) const {
        if constexpr (sizeof(T) == 2)
            return get(data()[i]);
        else
            return (double)data()[i];
    }
    void set(size_t i, double v) {
        if constexpr (sizeof(T) == 2)
            put(data() + i, (float)v);
        else
            data()[i] = (T)v;
    }
    Tensor copy() const {
        Tensor t(count);
        memcpy(t.data(), data(), count * sizeof(T));
        return t;
    }
    bool whole() const {
        for (size_t i = 0; i < GUARD; i++)
            if (memory.get()[count * sizeof(T) + i] != 0x5a) return false;
        return true;
    }
};

struct Result {
    double error = 0.;
    double bound = 0.;
};
inline std::vector<std::pair<std::string, Result>> results;
inline void note(const std::string& name, double error, double bound) {
    for (auto& r : results)
        if (r.first == name) {
            r.second.error = error > r.second.error || error != error ? error : r.second.error;
            return;
        }
    results.push_back({name, {error, bound}});
}
// Rounding to bf16 is off by up to 2^-8; f32 results may be off by a few units, more where many terms are added.
template <class T> double bound(double f32) { return sizeof(T) == 2 ? f32 + 1.02 / 256 : f32; }
template <class T> std::string named(const char* kernel) {
    return std::string(kernel) + (sizeof(T) == 2 ? "_bf16" : "_f32");
}
// The largest |got - wanted| / (floor + |wanted|).
template <class T, class W>
void compare(const std::string& name, const Tensor<T>& got, const W& wanted, double bound, double floor = 1.) {
    double worst = got.whole() ? 0. : NAN;
    for (size_t i = 0; i < got.count; i++) {
        double w = wanted(i), e = fabs(got.at(i) - w) / (floor + fabs(w));
        if (!(e <= worst)) worst = e;
    }
    note(name, worst, bound);
}
inline int report() {
    int failed = 0;
    for (auto& r : results) {
        bool ok = r.second.error <= r.second.bound;
        printf("%-36s largest error %.3g (bound %.3g)%s\n", r.first.c_str(), r.second.error, r.second.bound,
               ok ? "" : "  FAILED");
        failed |= !ok;
    }
    return failed;
}
inline u32 blocks(size_t count, size_t per_block) { return (u32)((count + per_block - 1) / per_block); }
// RUN(kernel, T, grid x, grid y, struct fields...): the f32 or the bf16 kernel, by T.
#define RUN_PLAIN(kernel, gx, gy, ...)      \
    do {                                    \
        kernel##_args args{__VA_ARGS__};    \
        emu_##kernel(&args, gx, gy, 1);     \
    } while (0)
#define RUN(kernel, T, gx, gy, ...)                \
    do {                                           \
        if constexpr (sizeof(T) == 2) {            \
            kernel##_bf16_args args{__VA_ARGS__};  \
            emu_##kernel##_bf16(&args, gx, gy, 1); \
        } else {                                   \
            kernel##_f32_args args{__VA_ARGS__};   \
            emu_##kernel##_f32(&args, gx, gy, 1);  \
        }                                          \
    } while (0)
