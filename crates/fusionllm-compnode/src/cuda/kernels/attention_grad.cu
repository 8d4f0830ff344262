#include "attention_grad.h"

using attention_dot_bf16_d32_args = attention_dot_args<u16>;
KERNEL(attention_dot_bf16_d32, attention_dot_bf16_d32_args, 128) { attention_dot<32>(a); }
using attention_kv_grad_bf16_d32_args = attention_grad_args<u16>;
KERNEL_RESIDENT(attention_kv_grad_bf16_d32, attention_kv_grad_bf16_d32_args, 128, 3) {
    attention_kv_grad<32, 32, true>(a);
}
using attention_q_grad_bf16_d32_args = attention_grad_args<u16>;
KERNEL_RESIDENT(attention_q_grad_bf16_d32, attention_q_grad_bf16_d32_args, 128, 4) { attention_q_grad<32, 32, 1>(a); }
using attention_dot_bf16_d64_args = attention_dot_args<u16>;
KERNEL(attention_dot_bf16_d64, attention_dot_bf16_d64_args, 128) { attention_dot<64>(a); }
using attention_kv_grad_bf16_d64_args = attention_grad_args<u16>;
KERNEL_RESIDENT(attention_kv_grad_bf16_d64, attention_kv_grad_bf16_d64_args, 128, 3) {
    attention_kv_grad<64, 32, true>(a);
}
using attention_q_grad_bf16_d64_args = attention_grad_args<u16>;
KERNEL_RESIDENT(attention_q_grad_bf16_d64, attention_q_grad_bf16_d64_args, 128, 3) { attention_q_grad<64, 32, 1>(a); }
using attention_dot_bf16_d128_args = attention_dot_args<u16>;
KERNEL(attention_dot_bf16_d128, attention_dot_bf16_d128_args, 128) { attention_dot<128>(a); }
using attention_kv_grad_bf16_d128_args = attention_grad_args<u16>;
KERNEL_RESIDENT(attention_kv_grad_bf16_d128, attention_kv_grad_bf16_d128_args, 128, 2) {
    attention_kv_grad<128, 16, false>(a);
}
using attention_q_grad_bf16_d128_args = attention_grad_args<u16>;
KERNEL_RESIDENT(attention_q_grad_bf16_d128, attention_q_grad_bf16_d128_args, 128, 2) {
    attention_q_grad<128, 16, 1>(a);
}
