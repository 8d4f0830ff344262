"""Writes the golden training fixture of a small ResNet, from PyTorch's own layers under torchvision's names.

    python tests/golden/resnet_train/make.py

Made with Python 3.11.7, torch 2.15.0 (CPU), safetensors 0.8.0. torchvision is not needed: the models below are its
`torchvision.models.resnet`, layer by layer. The run is deterministic (one thread, fixed seeds); other versions may
differ in the last digits.

Models, f32, of 3 classes, torchvision's initial values:
- "basic": the stem for CIFAR, basic blocks, depths [1, 2], widths [6, 8], images of 10 x 10 pixels.
- "bottleneck": the stem for ImageNet, bottleneck blocks, depths [1, 1], widths [4, 4], images of 18 x 18 pixels.

Training, 20 steps:
- A step takes 8 images as 4 micro-batches of 2. Batch norm goes by the micro-batch, and each moves the running values.
- A micro-batch's loss is the mean over its images. Its gradient is scaled by 1/4 and summed; a step's loss is the mean
  of the 4 losses, taken before the update.
- Then the gradient is clipped to global norm 1.0: factor min(1, 1.0 / (norm + 1e-6)). The norm recorded is the one
  before clipping.
- "adamw": betas (0.9, 0.95), eps 1e-8, weight decay 0.1 on parameters of two or more dimensions only, lr 3e-3.
- "sgd": momentum 0.9 (no dampening, no Nesterov), no decay, lr 0.05.
Both runs of a model start at the same weights and see the same images. After each, the model is evaluated by its running
values on the first micro-batch of the first step.

Files, beside this one, by model:
- MODEL/weights.safetensors   the initial state dict, without num_batches_tracked
- MODEL/images.safetensors    images: u8 [20, 8, 3, H, H], each standing for (u8 - 128) / 64; labels: i32 [20, 8]
- MODEL/OPTIMIZER.safetensors the running values after 20 steps
- MODEL/losses.json           adamw, sgd, adamw_grad_norm, sgd_grad_norm: 20 numbers each; adamw_eval, sgd_eval: one
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
STEPS, BATCH, MICRO_BATCHES, CLASSES = 20, 8, 4, 3
CLIP = 1.0


def conv(inputs, outputs, kernel, stride=1):
    """A convolution that keeps the size but for its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x):
        """Two convolutions beside the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """torchvision's Bottleneck, whose second convolution has the stride."""

    expansion = 4

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    def forward(self, x):
        """Three convolutions beside the shortcut."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def shortcut(inputs, outputs, stride):
    """A convolution where the shape changes."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """torchvision's ResNet, with its stem or one for small images."""

    def __init__(self, block, depths, widths, small):
        super().__init__()
        self.small = small
        self.conv1 = conv(3, widths[0], 3) if small else conv(3, widths[0], 7, 2)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.layers = len(depths)
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for index in range(depth):
                blocks.append(block(channels, width, 2 if number > 0 and index == 0 else 1))
                channels = width * block.expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        if not self.small:
            x = F.max_pool2d(x, 3, 2, 1)
        for number in range(self.layers):
            x = getattr(self, f"layer{number + 1}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


MODELS = {
    "basic": (10, lambda: ResNet(Basic, [1, 2], [6, 8], small=True)),
    "bottleneck": (18, lambda: ResNet(Bottleneck, [1, 1], [4, 4], small=False)),
}


def make_images(size):
    """Noise with a pattern for each class, and the classes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (STEPS, BATCH), generator=generator)
    patterns = torch.randn((CLASSES, 3, size, size), generator=generator)
    noise = torch.randn((STEPS, BATCH, 3, size, size), generator=generator)
    return (48 * (patterns[labels] + noise) + 128).clamp(0, 255).to(torch.uint8).contiguous(), labels


def make_optimizer(name, model):
    """The optimizer of this name."""
    parameters = list(model.parameters())
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def train(model, optimizer, images, labels):
    """Trains over all steps; each step's loss and gradient norm before clipping."""
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(images[step].chunk(MICRO_BATCHES), labels[step].chunk(MICRO_BATCHES), strict=True):
            loss = F.cross_entropy(model(x), y)
            (loss / MICRO_BATCHES).backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(total / MICRO_BATCHES)
    return losses, norms


def state(model, suffixes=("",)):
    """The state dict without counts, of names that end in one of these."""
    kept = {k: v.detach().clone() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    return {k: v.contiguous() for k, v in kept.items() if k.endswith(suffixes)}


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, (size, make) in MODELS.items():
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = make()
        first = state(model)
        save_file(first, folder / "weights.safetensors", metadata={"format": "pt"})
        bytes_, labels = make_images(size)
        images = (bytes_.float() - 128) / 64
        save_file({"images": bytes_, "labels": labels.to(torch.int32)}, folder / "images.safetensors")
        series = {}
        for optimizer in ["adamw", "sgd"]:
            model.load_state_dict(first, strict=False)
            model.train()
            losses, norms = train(model, make_optimizer(optimizer, model), images, labels)
            save_file(state(model, ("running_mean", "running_var")), folder / f"{optimizer}.safetensors")
            model.eval()
            with torch.no_grad():
                found = F.cross_entropy(model(images[0, :2]), labels[0, :2]).item()
            series |= {optimizer: losses, f"{optimizer}_grad_norm": norms, f"{optimizer}_eval": [found]}
        lines = [f'  "{k}": [{", ".join(f"{v:.9g}" for v in values)}]' for k, values in series.items()]
        (folder / "losses.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
