"""Cross-entropy in every form that people train with, as pure functions for JAX."""

from ._diagnose import Diagnosis as Diagnosis
from ._diagnose import Finding as Finding
from ._diagnose import diagnose as diagnose
from ._divergences import softmax_entropy as softmax_entropy
from ._divergences import softmax_js_divergence as softmax_js_divergence
from ._divergences import softmax_kl_divergence as softmax_kl_divergence
from ._general import softmax_loss as softmax_loss
from ._general import softmax_statistics as softmax_statistics
from ._logits.linear import LinearLogits as LinearLogits
from ._probability import binary_cross_entropy as binary_cross_entropy
from ._probability import categorical_cross_entropy as categorical_cross_entropy
from ._probability import kl_divergence as kl_divergence
from ._probability import nll_loss as nll_loss
from ._rows import mean as mean
from ._rows import total_weight as total_weight
from ._sigmoid import sigmoid_asymmetric_loss as sigmoid_asymmetric_loss
from ._sigmoid import sigmoid_cross_entropy as sigmoid_cross_entropy
from ._sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from ._softmax import softmax_cross_entropy as softmax_cross_entropy
from ._softmax import softmax_focal_loss as softmax_focal_loss
from ._softmax import softmax_poly_loss as softmax_poly_loss
from ._statistics import SoftmaxStatistics as SoftmaxStatistics
