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
void sums(u32 count, u32 per_block) {
    u32 parts = blocks(count, per_block);
    Tensor<float> x(count, 3.f), mean(1);
    Tensor<double> partial(parts), total(1);
    double squares = 0, plain = 0;
    for (u32 i = 0; i < count; i++) {
        squares += x.at(i) * x.at(i);
        plain += x.at(i);
    }
    sum_of_squares_args a{x.data(), partial.data(), count, per_block};
    emu_sum_of_squares(&a, parts, 1, 1);
    sum_doubles_args b{partial.data(), total.data(), parts};
    emu_sum_doubles(&b, 1, 1, 1);
    compare("sum_of_squares, sum_doubles", total, [&](size_t) { return squares; }, 1e-12);
    if (!partial.whole()) note("sum_of_squares, sum_doubles", NAN, 0);
    mean_loss_args c{x.data(), mean.data(), count};
    emu_mean_loss(&c, 1, 1, 1);
    compare("mean_loss", mean, [&](size_t) { return plain / count; }, 1e-7);
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
    for (u32 n : {1u, 255u, 1024u, 5001u}) {
        sums(n, 1024);
        sums(n, 4096);
        sums(n, 333);
    }
    return report();
}
