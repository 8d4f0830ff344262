#include "check.h"
#include "../rotary.cu"

template <class T> void test(u32 batch, u32 seq, u32 heads, u32 half) {
    const u32 rows = batch * seq, pairs = rows * heads * half, grid = blocks(pairs, 256 * Per16<T>::n);
    const size_t n = (size_t)pairs * 2;
    Tensor<T> x(n, 2.f), addend(n, 2.f);
    Tensor<float> table((size_t)2 * seq * half);
    for (u32 s = 0; s < seq; s++)
        for (u32 c = 0; c < half; c++) {
            const float angle = 3.f * uniform();
            table.set((size_t)s * half + c, cosf(angle));
            table.set((size_t)(seq + s) * half + c, sinf(angle));
        }
    for (float direction : {1.f, -1.f})
        for (int kind = 0; kind < 3; kind++) {  // alone; with an addend; over the addend
            Tensor<T> out(n), over = addend.copy(), &to = kind == 2 ? over : out;
            RUN(rotary, T, grid, 1, x.data(), kind == 0 ? nullptr : kind == 1 ? addend.data() : over.data(),
                table.data(), to.data(), pairs, seq, heads, half, direction);
            compare(
                named<T>("rotary"), to,
                [&](size_t i) {
                    const size_t c = i % (2 * half), k = c % half, s = i / (2 * half) / heads % seq, first = i - c + k;
                    const double cosine = table.at(s * half + k), sine = direction * table.at((seq + s) * half + k);
                    const double u = x.at(first), v = x.at(first + half);
                    return (c < half ? u * cosine - v * sine : v * cosine + u * sine) + (kind ? addend.at(i) : 0.);
                },
                bound<T>(1e-6));
        }
    // Turned back it is as it was.
    Tensor<T> there(n), back(n);
    RUN(rotary, T, grid, 1, x.data(), nullptr, table.data(), there.data(), pairs, seq, heads, half, 1.f);
    RUN(rotary, T, grid, 1, there.data(), nullptr, table.data(), back.data(), pairs, seq, heads, half, -1.f);
    compare(named<T>("rotary") + " and back", back, [&](size_t i) { return x.at(i); }, sizeof(T) == 2 ? 0.02 : 1e-6);
}
int main() {
    for (u32 half : {1u, 3u, 4u, 8u, 12u, 32u, 64u})
        for (u32 heads : {1u, 3u}) {
            test<float>(2, 7, heads, half);
            test<u16>(2, 7, heads, half);
        }
    test<float>(1, 300, 2, 32);
    test<u16>(1, 300, 2, 64);
    return report();
}
