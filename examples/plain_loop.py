"""GRPO in a plain PyTorch loop: a GRU over 512 tokens learns to answer each of four prompts with its own target token. CPU, seconds."""

import torch

from actial_fast import AdvantageSpec, GRPOSpec, group_advantages, linear_grpo_loss

torch.manual_seed(0)
VOCAB, HIDDEN, PROMPTS, SAMPLES, LENGTH = 512, 64, 4, 64, 8
device = "cuda" if torch.cuda.is_available() else "cpu"
embed = torch.nn.Embedding(VOCAB, HIDDEN, device=device)
gru = torch.nn.GRU(HIDDEN, HIDDEN, batch_first=True, device=device)
head = torch.nn.Linear(HIDDEN, VOCAB, bias=False, device=device)
optimizer = torch.optim.Adam([*embed.parameters(), *gru.parameters(), *head.parameters()], lr=1e-2)
groups = torch.arange(PROMPTS, device=device).repeat_interleave(SAMPLES)  # which prompt each completion answers
targets = 100 * groups + 42
cu_seqlens = torch.arange(0, (len(groups) + 1) * LENGTH, LENGTH)  # where the completions lie among the packed rows
spec = GRPOSpec.named("dapo", entropy_coef=1e-3)

for step in range(31):
    with torch.no_grad():  # sample a completion token by token
        token, state, tokens = groups[:, None], None, [groups[:, None]]
        for _ in range(LENGTH):
            out, state = gru(embed(token), state)
            token = torch.multinomial(head(out[:, 0]).softmax(-1), 1)
            tokens.append(token)
    ids = torch.cat(tokens, 1)  # (N, 1 + LENGTH)
    rewards = (ids[:, 1:] == targets[:, None]).float().mean(1)
    advantages = group_advantages(rewards, groups, AdvantageSpec())
    hidden = gru(embed(ids[:, :-1]))[0].flatten(0, 1)  # (T, HIDDEN): only rows whose next token is trained reach the head
    loss = linear_grpo_loss(hidden, head.weight, ids[:, 1:].flatten(), advantages, None, None, spec, cu_seqlens=cu_seqlens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step:3d}  reward {rewards.mean():.3f}", flush=True)
