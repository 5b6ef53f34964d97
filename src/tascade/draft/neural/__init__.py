"""Drafts from a network: today a second, smaller model, in classic speculative decoding.

The assistant drafts a chain token by token; the target verifies it with its full head (Leviathan et
al., 2211.17192). So the assistant's head may be cut to the task's and the request's tokens, as in
FR-Spec (2502.14856), VocabTrim (2506.22694) and NanoSpec (2605.26444): the words stay the target's.
"""
