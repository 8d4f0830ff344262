#include "check.h"
#include "../reduce.cu"

template <class T> void columns(u32 rows, u32 columns, u32 rows_per_part) {
    u32 parts = blocks(rows, rows_per_part);
    Tensor<T> x((size_t)rows * columns, 2.f);
    Tensor<float> partial((size_t)parts * columns);
    RUN(column_sum, T, blocks(columns, 128), parts, x.data(), partial.data(), rows, columns, rows_per_part);
    compare(
        named<T>("column_sum"), partial,
        [&](size_t i) {
            double sum = 0;
            for (u32 r = (u32)(i / columns) * rows_per_part; r < rows && r < (i / columns + 1) * rows_per_part; r++)
                sum += x.at((size_t)r * columns + i % columns);
            return sum;
        },
        1e-5);
}
void folds(u32 parts, u32 columns, u32 stride, u32 grid) {
    Tensor<float> partial((size_t)parts * stride, 2.f), out(columns, 2.f), before = out.copy();
    fold_args a{partial.data(), out.data(), parts, stride, columns};
    emu_fold(&a, grid, 1, 1);
    compare(
        "fold", out,
        [&](size_t c) {
            double sum = before.at(c);
            for (u32 p = 0; p < parts; p++) sum += partial.at((size_t)p * stride + c);
            return sum;
        },
        1e-5, 3.);
}
void means(u32 count) {
    Tensor<float> losses(count, 3.f), mean(1);
    double sum = 0;
    for (u32 i = 0; i < count; i++) sum += losses.at(i);
    mean_loss_args a{losses.data(), mean.data(), count};
    emu_mean_loss(&a, 1, 1, 1);
    compare("mean_loss", mean, [&](size_t) { return sum / count; }, 1e-7);
}
int main() {
    for (u32 n : {1u, 3u, 8u, 100u, 128u, 129u, 136u, 768u, 2304u})
        for (u32 rows : {1u, 5u, 64u, 200u}) {
            columns<float>(rows, n, 64);
            columns<u16>(rows, n, 64);
            columns<u16>(rows, n, 150);
        }
    folds(1, 1, 1, 1);
    folds(7, 33, 50, 2);
    folds(100, 768, 1536, 24);
    folds(264, 768, 1536, 3);
    for (u32 n : {1u, 255u, 1024u, 5001u}) means(n);
    return report();
}
