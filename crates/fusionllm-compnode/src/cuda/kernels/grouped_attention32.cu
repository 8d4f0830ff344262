#include "attention32.h"

using grouped_attention_f32_d64_args = grouped_attention_args<float>;
KERNEL_RESIDENT(grouped_attention_f32_d64, grouped_attention_f32_d64_args, 128, 3) { attention(a); }
