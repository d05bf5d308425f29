"""Cross-entropy in JAX: accurate, contracted, one waist of row statistics."""

from ._divergences import softmax_entropy as softmax_entropy
from ._divergences import softmax_js_divergence as softmax_js_divergence
from ._divergences import softmax_kl_divergence as softmax_kl_divergence
from ._reduction import mean as mean
from ._softmax import softmax_cross_entropy as softmax_cross_entropy
from ._softmax import softmax_focal_loss as softmax_focal_loss
from ._softmax import softmax_loss as softmax_loss
from ._softmax import softmax_poly_loss as softmax_poly_loss
from ._softmax import softmax_statistics as softmax_statistics
from ._statistics import SoftmaxStatistics as SoftmaxStatistics
