"""Where logits come from. Every source gives the same statistics, so every loss works on each of them."""
