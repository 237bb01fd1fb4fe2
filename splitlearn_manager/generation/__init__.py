"""Generating text for many at once: from a request's body to its tokens, and to text.

    body --requests--> what is asked --text--> token ids --engine--> tokens --text--> pieces of text

`requests`, `sampling`, `stopping`, `detokenizer`, `logprobs` and `turns` are pure; `stages`,
`sampler` and `decoder` compute, in the thread of a model; `engine` is asyncio's side of it.
"""
