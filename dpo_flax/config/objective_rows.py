"""The rows of the objective section; the losses check their values."""

from dpo_flax.config.row import Row

OBJECTIVE: dict[str, Row] = {
  'loss': Row(
    default='sigmoid',
    type=object,
    names=True,
    meaning='A loss of losses/losses.py, or a tuple of them with one of loss_weights each.',
  ),
  'loss_weights': Row(default=None, type=tuple, meaning='One for each loss; unset: 1.0 each.'),
  'beta': Row(
    default=0.1,
    meaning='Strength of the pull to the reference (arXiv:2305.18290, eq. 7). It also scales the '
    'reported rewards, which is all it does beside losses that have none (sft, orpo).',
  ),
  # What follows belongs to some losses; set beside another, it is refused.
  'label_smoothing': Row(default=None, type=float, meaning='Share of flipped labels, [0, 0.5).'),
  'gamma': Row(default=None, type=float, meaning='simpo: margin per token; unset: 0.5.'),
  'cpo_alpha': Row(
    default=None, type=float, meaning="cpo: weight of the chosen response's NLL; unset: 1.0."
  ),
  'orpo_lambda': Row(
    default=None, type=float, meaning='orpo: weight of the odds ratio; unset: 0.1.'
  ),
  'dpop_lambda': Row(
    default=None, type=float, meaning='dpop: weight of a falling chosen response; unset: 50.'
  ),
  'discopop_temperature': Row(default=None, type=float, meaning='In (0, 1]; unset: 0.05.'),
  'divergence': Row(
    default='reverse_kl', meaning='reverse_kl, forward_kl, js or alpha (arXiv:2309.16240).'
  ),
  'alpha_divergence': Row(default=None, type=float, meaning="The paper's alpha, in (0, 1)."),
  'sft_weight': Row(
    default=None, type=float, meaning="RPO: adds this times the chosen response's mean NLL."
  ),
  'ld_alpha': Row(
    default=None, type=float, meaning='LD-DPO: weight of tokens past the shorter response.'
  ),
  'wpo': Row(default=False, meaning='Weigh pairs by how on-policy they are (arXiv:2406.11827).'),
  'reference_free': Row(default=False, meaning="The reference's log-ratio counts as 0."),
  'kl_penalty_weight': Row(default=None, type=float, meaning='Of the exact KL to the reference.'),
  'token_statistics': Row(
    default=False,
    meaning="Report the policy's entropy and, where the loss runs the reference, the KL to it.",
  ),
}
