"""The small networks of encoders and decoders that look at one token or query at a time."""

from torch import Tensor, nn

from ...ops import feed_forward

__all__ = ["FeedForward", "box_branch", "class_branch", "perceptron"]


class FeedForward(nn.Module):
    """Linear - ReLU - Linear, without the residual connection.

    Args:
        embed_dim: channels of input and output.
        hidden_dim: channels in between.
        dropout: after the activation, in training.
        prelu: the activation is a PReLU with one learned slope instead.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float = 0.0, prelu: bool = False):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.prelu = nn.PReLU() if prelu else None
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., embed_dim] -> [..., embed_dim]"""
        if self.prelu is not None:
            return self.linear2(self.dropout(self.prelu(self.linear1(x))))
        dropout = self.dropout.p if self.training else 0.0
        weights = (p for layer in (self.linear1, self.linear2) for p in (layer.weight, layer.bias))
        return feed_forward(x, *weights, dropout)


def perceptron(in_channels: int, hidden_channels: int, out_channels: int) -> nn.Sequential:
    """Linear - ReLU - Linear."""
    branch = nn.Sequential(nn.Linear(in_channels, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, out_channels))
    for linear in branch[::2]:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return branch


def class_branch(embed_dim: int, num_classes: int) -> nn.Linear:
    """Linear classifier whose bias starts every class at a probability of 1 %."""
    linear = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(linear.bias, -4.59511985013459)  # -log((1 - 0.01) / 0.01)
    return linear


def box_branch(embed_dim: int) -> nn.Sequential:
    """Three-layer perceptron to the four box logits, which start at zero."""
    branch = nn.Sequential(
        nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 4)
    )
    nn.init.zeros_(branch[-1].weight)
    nn.init.zeros_(branch[-1].bias)
    return branch
