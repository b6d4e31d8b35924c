"""How the embedded base is made: icon packs, scenes, and the stages that train its parts."""
