#include "attention.h"

using grouped_attention_bf16_d32_args = grouped_attention_args<u16>;
KERNEL_RESIDENT(grouped_attention_bf16_d32, grouped_attention_bf16_d32_args, 128, 4) { attention<32, 64, 1>(a); }
using grouped_attention_bf16_d64_args = grouped_attention_args<u16>;
KERNEL_RESIDENT(grouped_attention_bf16_d64, grouped_attention_bf16_d64_args, 128, 3) { attention<64, 64, 1>(a); }
using grouped_attention_bf16_d128_args = grouped_attention_args<u16>;
KERNEL_RESIDENT(grouped_attention_bf16_d128, grouped_attention_bf16_d128_args, 128, 2) { attention<128, 32, 1>(a); }
