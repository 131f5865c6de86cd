"""Our policy loss in verl's registry, beside verl's own: python examples/verl_loss.py

In a real run VERL_USE_EXTERNAL_MODULES=actial_fast.integrations.verl registers it in every worker, and
actor_rollout_ref.actor.policy_loss.loss_mode=actial_vanilla chooses it. Here a head over fixed hidden states is the policy: 64 replies of 6
tokens, rewarded for tokens below 8 of 64, and each step takes the gradient of our loss.
"""

import torch

from actial_fast import AdvantageSpec, group_advantages
from actial_fast.integrations.verl import linear_cross_entropy, register

try:
    register()
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig
except ImportError as error:
    raise SystemExit(f"This example runs beside verl: {error}") from None

torch.manual_seed(0)
replies, length, width, vocabulary = 64, 6, 16, 64
hidden, weight = torch.randn(replies, length, width), torch.zeros(vocabulary, width, requires_grad=True)
mask = torch.arange(length) < torch.randint(1, length + 1, (replies, 1))
config = ActorConfig(strategy="fsdp", rollout_n=8, use_dynamic_bsz=True, clip_ratio_high=0.28, loss_agg_mode="token-mean")
for step in range(8):
    ids = torch.distributions.Categorical(logits=hidden @ weight.detach().T).sample()
    rewards = ((ids < 8) & mask).sum(1) / mask.sum(1)
    advantages = group_advantages(rewards, torch.arange(replies) // 8, AdvantageSpec())[:, None].expand(replies, length)
    old = linear_cross_entropy(hidden, weight, ids)[0].view(replies, length).detach()
    for _ in range(2):  # the second pass is off policy, so that ratios leave the clip
        found = {}
        for name in ("actial_vanilla", "vanilla"):
            logp = linear_cross_entropy(hidden, weight, ids)[0].view(replies, length)
            loss, metrics = get_policy_loss_fn(name)(old, logp, advantages, mask, config.loss_agg_mode, config)
            found[name] = loss.item(), torch.autograd.grad(loss, weight)[0], metrics["actor/pg_clipfrac"]
        (loss, gradient, clipped), (theirs, their_gradient, _) = found.values()
        weight.data -= 20 * gradient
    gap = (gradient - their_gradient).abs().max()
    text = f"step {step}: reward {rewards.mean():.3f}, clipped {clipped:.2f}, loss {loss:+.5f}, verl's {theirs:+.5f}"
    print(f"{text}, largest difference of their gradients {gap:.0e}")
