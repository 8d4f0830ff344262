#include "norm.h"

using layer_norm_f32_args = norm_args<float>;
using layer_norm_bf16_args = norm_args<u16>;
KERNEL_RESIDENT(layer_norm_f32, layer_norm_f32_args, 256, 2) { norm<true>(a); }
KERNEL_RESIDENT(layer_norm_bf16, layer_norm_bf16_args, 256, 2) { norm<true>(a); }
using layer_norm_grad_f32_args = norm_grad_args<float>;
using layer_norm_grad_bf16_args = norm_grad_args<u16>;
KERNEL_RESIDENT(layer_norm_grad_f32, layer_norm_grad_f32_args, 256, 2) { norm_grad<true>(a); }
KERNEL_RESIDENT(layer_norm_grad_bf16, layer_norm_grad_bf16_args, 256, 2) { norm_grad<true>(a); }
