"""Operations on all layers of a model: adapt, switch, measure and restore them."""
