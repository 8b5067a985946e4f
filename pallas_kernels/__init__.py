"""Operations on raw arrays: each file opens with its plain `jax.numpy` reference."""
