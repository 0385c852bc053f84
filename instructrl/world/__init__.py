"""The tiny world: text, instructions, demonstrators, labelers and a gold preference, all generated, from a seed.

    world = World(seed=0, people=24, strangers=8)
    prompt = world.prompts(1, random.Random(0))[0]
    world.judge(prompt, world.reference(prompt, random.Random(1))).utility  # about 4, the best there is

`world_data` generates what the data stage writes. Pure Python: nothing here imports torch.
"""

from instructrl.world.data import WorldData, make_world, world_data
from instructrl.world.gold import Judgement
from instructrl.world.labelers import Labeler, labelers, ranks
from instructrl.world.prompts import Prompt
from instructrl.world.world import World

__all__ = ["Judgement", "Labeler", "Prompt", "World", "WorldData", "labelers", "make_world", "ranks", "world_data"]
