"""TRL's preference losses on given log-probs, the golden values of tests/test_objectives_trl.py.

    python benchmarks/trl_losses.py tests/trl_losses.json      (in a venv with torch and trl 1.16)

Calls TRL's own loss code with models that return chosen log-probs; one pair or step at a time, for
TRL gives the mean of a batch. Token log-probs are drawn from a fixed seed and written beside the
losses.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# pyright: reportMissingImports=false
import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import dpo_trainer, kto_trainer

LENGTHS = ((4, 9), (7, 2), (5, 5), (1, 30))  # scored tokens of the chosen and rejected branch
BETAS = (0.1, 1.0)
DPO = (
    ("sigmoid", "sigmoid", {}),
    ("robust", "robust", {"label_smoothing": 0.2}),
    ("hinge", "hinge", {}),
    ("identity_po", "ipo", {}),
    ("apo_zero", "apo_zero", {}),
    ("apo_down", "apo_down", {}),
    ("sigmoid mean", "sigmoid_norm", {}),
    ("sigmoid desensitised", "sigmoid", {"ld_alpha": 0.3}),
    ("hinge desensitised", "hinge", {"ld_alpha": 0.3}),
)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def trainer(**settings) -> SimpleNamespace:
    """What TRL's loss methods read of a trainer, metrics into the void."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    usual = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "label_smoothing": 0.0,
        "_metrics": mock.MagicMock(),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
    }
    return SimpleNamespace(**usual | settings)


def outputs(logps: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), loss=None
    )


def padded(branches) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs [n, T - 1], completion mask [n, T]): one prompt token, then the branch."""
    longest = max(map(len, branches))
    logps = [list(b) + [0.0] * (longest - len(b)) for b in branches]
    mask = [[0] + [1] * len(b) + [0] * (longest - len(b)) for b in branches]
    return tensor(logps), torch.tensor(mask)


def dpo(pair, loss_type: str, beta: float, settings: dict[str, float]) -> float:
    logps, mask = padded(pair["policy"])
    reference, _ = padded(pair["reference"])
    fake = trainer(
        beta=beta,
        ld_alpha=None,
        precompute_ref_logps=False,
        ref_model=lambda **_: outputs(reference),
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
    )
    vars(fake).update(settings)
    inputs = {"input_ids": mask * 0, "attention_mask": mask * 0 + 1, "completion_mask": mask}
    with mock.patch.object(dpo_trainer, "disable_gradient_checkpointing", lambda *_: nullcontext()):
        return float(
            dpo_trainer.DPOTrainer._compute_loss(fake, lambda **_: outputs(logps), inputs, False)
        )


def simpo(pair, beta: float, gamma: float) -> float:
    means = [tensor(branch).mean()[None] for branch in pair["policy"]]
    fake = trainer(beta=beta, alpha=0.0, loss_type="simpo", simpo_gamma=gamma)
    return float(CPOTrainer.cpo_loss(fake, *means)[0])


def orpo(pair, beta: float) -> float:
    """TRL's odds-ratio term, and the chosen branch's mean negative log-likelihood."""
    means = [tensor(branch).mean()[None] for branch in pair["policy"]]
    ratio = ORPOTrainer.odds_ratio_loss(trainer(beta=beta), *means)[0]
    return float(-means[0] - ratio)


def kto(pairs, beta: float) -> tuple[float, float]:
    """(loss, z0) of a step of all branches: chosen ones desirable, the others not.

    The mismatched log-probs are the branches' own, moved on by one: only their mean matters.
    """
    policy = [branch for pair in pairs for branch in pair["policy"]]
    reference = [branch for pair in pairs for branch in pair["reference"]]
    logps, mask = padded(policy)
    sums = tensor([sum(branch) for branch in reference])
    mismatched = torch.roll(logps.sum(-1), 1)
    fake = trainer(
        beta=beta,
        loss_type="kto",
        desirable_weight=1.5,
        undesirable_weight=0.5,
        calculate_KL=True,
        precompute_ref_logps=True,
        _compute_kl_logps=lambda *_: mismatched,
    )
    batch = {
        "input_ids": mask * 0,
        "attention_mask": mask * 0 + 1,
        "completion_mask": mask,
        "label": torch.tensor([True, False] * len(pairs)),
        "ref_logps": sums,
        "ref_KL_logps": torch.roll(sums, 1) - 20.0,
    }
    loss = kto_trainer.KTOTrainer._compute_loss(fake, lambda **_: outputs(logps), batch, False)
    return float(loss), float(mismatched.sub(batch["ref_KL_logps"]).mean().clamp(min=0))


def main() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        {
            who: [np.round(-rng.exponential(1.2, n), 4).tolist() for n in lengths]
            for who in ("policy", "reference")
        }
        for lengths in LENGTHS
    ]
    found = {
        f"{name} {beta}": [dpo(pair, loss_type, beta, settings) for pair in pairs]
        for name, loss_type, settings in DPO
        for beta in BETAS
    }
    found |= {f"simpo {beta}": [simpo(pair, beta, 0.5) for pair in pairs] for beta in BETAS}
    found |= {f"orpo {beta}": [orpo(pair, beta) for pair in pairs] for beta in BETAS}
    found |= {f"kto {beta}": list(kto(pairs, beta)) for beta in BETAS}
    record = {"trl": trl.__version__, "pairs": pairs, "losses": found}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
