"""The gated delta rule and the short causal convolution of recurrent layers."""

from distill.kernels.recurrent.convolution import causal_convolution as causal_convolution
from distill.kernels.recurrent.convolution import convolution_step as convolution_step
from distill.kernels.recurrent.delta_rule import CHUNK as CHUNK
from distill.kernels.recurrent.delta_rule import delta_rule_step as delta_rule_step
from distill.kernels.recurrent.delta_rule import flops_per_token as flops_per_token
from distill.kernels.recurrent.delta_rule import gated_delta_rule as gated_delta_rule
