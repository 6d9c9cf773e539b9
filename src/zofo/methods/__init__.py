"""What a step does: one class for each method, made of first-order and zeroth-order levels; and the table of them."""

from zofo.methods.bilevel import Bilevel
from zofo.methods.first_order import FirstOrder
from zofo.methods.meta import FirstOrderMAML, Reptile
from zofo.methods.method import Method
from zofo.methods.two_stage import TwoStage
from zofo.methods.untrained import Untrained
from zofo.methods.zeroth_order import ZerothOrder

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Bilevel, ZerothOrder, FirstOrder, TwoStage, Reptile, FirstOrderMAML, Untrained)
}
