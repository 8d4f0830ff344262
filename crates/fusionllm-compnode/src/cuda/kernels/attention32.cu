#include "attention32.h"

using attention_f32_d64_args = attention_args<float>;
KERNEL_RESIDENT(attention_f32_d64, attention_f32_d64_args, 128, 3) { attention(a); }
