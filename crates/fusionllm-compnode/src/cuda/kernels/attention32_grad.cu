#include "attention32_grad.h"

using attention_dot_f32_d64_args = attention_dot_args<float>;
KERNEL(attention_dot_f32_d64, attention_dot_f32_d64_args, 128) { attention_dot(a); }
using attention_kv_grad_f32_d64_args = attention_grad_args<float>;
KERNEL_RESIDENT(attention_kv_grad_f32_d64, attention_kv_grad_f32_d64_args, 128, 3) { attention_kv_grad(a); }
using attention_q_grad_f32_d64_args = attention_grad_args<float>;
KERNEL_RESIDENT(attention_q_grad_f32_d64, attention_q_grad_f32_d64_args, 128, 3) { attention_q_grad(a); }
