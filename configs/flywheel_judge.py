"""The judge of configs/flywheel.yaml counts words of praise and of blame: a stand-in for people or a language model."""

PRAISE = """
    amazing beautiful best brilliant charming delightful enjoyable entertaining excellent fascinating fine fresh fun
    funny good great gripping heartfelt honest hilarious impressive intelligent love lovely memorable moving perfect
    powerful smart solid strong sweet thoughtful thrilling touching warm well wit witty wonderful worth
"""
BLAME = """
    awful bad bland boring clumsy confusing contrived dim dull dumb empty fails feeble flat forced hackneyed lacks lame
    lazy lifeless mess mindless never no not nothing pointless poor predictable pretentious ridiculous silly slow stale
    stupid tedious thin tired tiresome too ugly uninspired unfunny weak worse worst
"""


def judge(_prompt: str, responses: list[str]) -> list[float]:
    """How many words of each response praise, less those that blame."""
    praise, blame = PRAISE.split(), BLAME.split()
    found: list[float] = []
    for response in responses:
        words = [word.strip(".,;:!?\"'()-") for word in response.lower().split()]
        found.append(float(sum(word in praise for word in words) - sum(word in blame for word in words)))
    return found
