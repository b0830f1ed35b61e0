"""Models of flowvision, an LSTM and a small transformer, with a batch of each."""

from __future__ import annotations

from typing import Any, Dict, Tuple

MODELS: Dict[str, Tuple[str, int]] = {
    "ViT-tiny": ("vit_tiny_patch16_224", 2),
    "Swin-tiny": ("swin_tiny_patch4_window7_224", 1),
    "ConvNeXt-tiny": ("convnext_tiny_224", 1),
    "MobileNetV2": ("mobilenet_v2", 4),
    "MobileNetV3-small": ("mobilenet_v3_small", 4),
    "EfficientNet-B0": ("efficientnet_b0", 2),
}
"""flowvision's name, and images of 3x224x224 in a batch."""
RESNETS = {"ResNet-18": ("resnet18", 8), "ResNet-50": ("resnet50", 2)}
"""The first for images of 3x32x32."""
TEXT = ("LSTM", "transformer")
WORDS, WIDTH, LENGTH, SENTENCES = 1000, 128, 64, 16


def text_model(name: str) -> Any:
    """An LSTM of two layers, or a transformer of two blocks, that tells the next word."""
    import oneflow as flow
    from oneflow import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, WIDTH)
            self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
            self.head = nn.Linear(WIDTH, WORDS)

        def forward(self, x: Any) -> Any:
            return self.head(self.lstm(self.words(x))[0]).reshape(-1, WORDS)

    class Attention(nn.Module):
        """Of queries, keys and values that lie side by side, in four heads."""

        def forward(self, qkv: Any) -> Any:
            n, length, _ = qkv.shape
            q, k, v = qkv.view(n, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
            scores = flow.matmul(q, k.transpose(-2, -1)) * (WIDTH // 4) ** -0.5
            out = flow.matmul(scores.softmax(dim=-1), v)
            return out.transpose(1, 2).reshape(n, length, WIDTH)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 3 * WIDTH),
                Attention(),
                nn.Linear(WIDTH, WIDTH),
            )
            self.think = nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            x = x + self.attend(x)
            return x + self.think(x)

    if name == "LSTM":
        return Recurrent()
    blocks = [Block(), Block()]
    head = [nn.Linear(WIDTH, WORDS), nn.Flatten(0, 1)]
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), *blocks, *head)


def network(name: str) -> Tuple[Any, Any, Any]:
    """The model, a batch, and the labels of all that it puts out."""
    import flowvision.models
    import oneflow as flow

    if name in TEXT:
        words = flow.randint(0, WORDS, (SENTENCES, LENGTH))
        return text_model(name), words, words.view(-1)
    made, images = {**MODELS, **RESNETS}[name]
    side = 32 if name == "ResNet-18" else 224
    model = getattr(flowvision.models, made)(num_classes=10)
    return model, flow.randn(images, 3, side, side), flow.randint(0, 10, (images,))
