#include "attention32_grad.h"

using grouped_attention_dot_f32_d64_args = attention_dot_args<float>;
KERNEL(grouped_attention_dot_f32_d64, grouped_attention_dot_f32_d64_args, 128) { attention_dot(a); }
using grouped_attention_kv_grad_f32_d64_args = grouped_attention_grad_args<float>;
KERNEL_RESIDENT(grouped_attention_kv_grad_f32_d64, grouped_attention_kv_grad_f32_d64_args, 128, 3) {
    attention_kv_grad(a);
}
using grouped_attention_q_grad_f32_d64_args = grouped_attention_grad_args<float>;
KERNEL_RESIDENT(grouped_attention_q_grad_f32_d64, grouped_attention_q_grad_f32_d64_args, 128, 3) {
    attention_q_grad(a);
}
