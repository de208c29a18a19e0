"""Scores of evaluated prompts."""

import torch

from copris_lightning.core.evaluation import avg_at_k, pass_at_k

REWARDS = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.9, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_avg_at_k_is_the_mean_over_a_prompts_samples():
    torch.testing.assert_close(avg_at_k(REWARDS), torch.tensor([0.5, 0.225, 1.0]))
    assert avg_at_k(torch.tensor([[1, 0]])).tolist() == [0.5]


def test_pass_at_k_asks_for_one_sample_at_the_threshold():
    assert pass_at_k(REWARDS).tolist() == [1.0, 0.0, 1.0]
    assert pass_at_k(REWARDS, threshold=0.5).tolist() == [1.0, 1.0, 1.0]
    assert pass_at_k(REWARDS, threshold=2.0).tolist() == [0.0, 0.0, 0.0]
