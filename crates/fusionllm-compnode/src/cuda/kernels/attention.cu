#include "attention.h"

using attention_bf16_d32_args = attention_args<u16>;
KERNEL_RESIDENT(attention_bf16_d32, attention_bf16_d32_args, 128, 4) { attention<32, 64, 1>(a); }
using attention_bf16_d64_args = attention_args<u16>;
KERNEL_RESIDENT(attention_bf16_d64, attention_bf16_d64_args, 128, 3) { attention<64, 64, 1>(a); }
using attention_bf16_d128_args = attention_args<u16>;
KERNEL_RESIDENT(attention_bf16_d128, attention_bf16_d128_args, 128, 2) { attention<128, 32, 1>(a); }
