"""The demo's closed world: everyday things, their kinds, and what is true of them.

`KINDS` lists the things of each kind. `PROPERTIES` says, for each property,
which things have it and which clearly do not; whatever is in neither list is a
matter of opinion and never asked about:

    >>> from world import truth
    >>> [truth("can fly", thing) for thing in ("robin", "penguin", "chicken")]
    [True, False, None]

A list is words: a kind stands for all its things, `@group` for several kinds,
`-x` takes x (a thing, a kind or a group) out again, and an underscore stands
for a space.

    python data/demo/world.py     # counts, and what is known of every property
"""

import argparse
import os
import sys

# kind: (plural, things). A leading "*" marks a name without an article: "gold is a metal".
KINDS = {
    "bird": (
        "birds",
        """robin sparrow eagle hawk owl duck swan parrot pigeon crow raven canary flamingo
        seagull stork swallow chicken penguin ostrich emu""",
    ),
    "mammal": (
        "mammals",
        """dog cat horse cow sheep goat pig lion tiger wolf fox leopard rabbit mouse squirrel
        bear elephant giraffe zebra camel monkey kangaroo bat whale dolphin platypus""",
    ),
    "fish": ("fish", "trout salmon shark tuna cod goldfish herring carp pike"),
    "insect": (
        "insects",
        """bee wasp butterfly moth dragonfly mosquito ladybird firefly ant beetle grasshopper
        cockroach""",
    ),
    "arachnid": ("arachnids", "spider scorpion tick tarantula"),
    "reptile": ("reptiles", "snake cobra lizard gecko crocodile alligator tortoise"),
    "amphibian": ("amphibians", "frog toad newt salamander"),
    "mollusc": ("molluscs", "snail clam oyster mussel octopus slug"),
    "crustacean": ("crustaceans", "crab lobster shrimp prawn"),
    "tree": ("trees", "oak birch maple willow elm beech pine fir spruce"),
    "flower": ("flowers", "rose tulip daisy sunflower daffodil violet poppy orchid"),
    "fruit": (
        "fruits",
        """apple banana lemon lime orange cherry pear peach plum grape strawberry raspberry
        melon apricot""",
    ),
    "vegetable": (
        "vegetables",
        """carrot potato radish turnip beetroot cabbage lettuce *spinach *broccoli pea leek
        cauliflower""",
    ),
    "sweet": ("sweets", "*chocolate *toffee *fudge lollipop *marzipan *candyfloss"),
    "drink": ("drinks", "*water *milk *tea *coffee *lemonade *cola *beer *wine"),
    "tool": ("tools", "hammer saw axe shovel spade screwdriver wrench rake drill broom"),
    "utensil": ("utensils", "spoon fork knife plate cup bowl ladle whisk"),
    "appliance": (
        "appliances",
        "fridge freezer oven toaster microwave dishwasher hairdryer vacuum_cleaner",
    ),
    "device": ("devices", "phone television computer radio laptop tablet"),
    "lamp": ("lamps", "candle lantern torch spotlight streetlight"),
    "furniture": (
        "pieces of furniture",
        "chair armchair sofa stool bench table desk bookcase wardrobe bed cradle",
    ),
    "garment": (
        "garments",
        """shirt coat dress sweater skirt hat cap bonnet beret shoe boot sock sandal slipper
        glove mitten scarf""",
    ),
    "instrument": (
        "instruments",
        """piano guitar violin cello harp banjo flute trumpet clarinet trombone saxophone drum
        tambourine""",
    ),
    "vehicle": ("vehicles", "car bus truck van taxi motorcycle tractor bicycle tricycle"),
    "boat": ("boats", "canoe kayak rowboat sailboat ferry motorboat tugboat"),
    "aircraft": ("aircraft", "airplane helicopter jet glider airship"),
    "building": ("buildings", "house school church hospital castle barn lighthouse library hotel"),
    "stationery": (
        "pieces of stationery",
        "pen pencil crayon marker eraser ruler stapler paperclip",
    ),
    "publication": ("publications", "book newspaper magazine comic dictionary atlas"),
    "metal": (
        "metals",
        "*gold *silver *platinum *iron *steel *copper *lead *tin *aluminium *mercury",
    ),
    "gas": ("gases", "*oxygen *helium *hydrogen *nitrogen *methane *neon"),
    "gemstone": ("gemstones", "ruby emerald sapphire diamond"),
    "rock": ("rocks", "*granite *marble *slate *limestone *basalt *coal"),
    "fabric": ("fabrics", "*cotton *wool *silk *linen *nylon *polyester"),
    "material": ("materials", "*glass *plastic *rubber *wood *paper *cardboard *leather"),
    "planet": ("planets", "*Venus *Mars *Jupiter *Saturn *Uranus *Neptune"),
    "country": (
        "countries",
        """*France *Spain *Italy *Germany *Poland *Greece *Japan *China *India *Thailand
        *Vietnam *Kenya *Nigeria *Ghana *Ethiopia *Brazil *Peru *Chile *Argentina *Canada""",
    ),
    "sport": (
        "sports",
        """*football *tennis *basketball *volleyball *golf *cricket *swimming *boxing *judo
        *skiing *skating *cycling *rowing""",
    ),
    "job": (
        "jobs",
        "doctor nurse surgeon teacher baker farmer pilot plumber carpenter tailor barber",
    ),
}

GROUPS = {
    "animals": "bird mammal fish insect arachnid reptile amphibian mollusc crustacean",
    "plants": "tree flower",
    "foods": "fruit vegetable sweet drink",
    "household": """tool utensil appliance device lamp furniture garment instrument stationery
        publication""",
    "transport": "vehicle boat aircraft",
    "stuff": "metal gas gemstone rock fabric material",
}
GROUPS["living"] = "@animals @plants"
GROUPS["artefacts"] = "@household @transport building"
GROUPS["lifeless"] = "@artefacts @stuff planet"

# A few colours that nobody would argue about.
COLOURS = {
    "yellow": "banana lemon sunflower daffodil canary",
    "red": "ruby cherry strawberry raspberry poppy ladybird",
    "green": "emerald lime lettuce spinach broccoli pea",
    "black": "crow raven coal",
    "orange": "carrot apricot tiger goldfish orange",
    "white": "milk daisy cauliflower",
}

# property: (things that have it, things that clearly do not)
PROPERTIES = {
    # animals
    "can fly": (
        """bird -chicken -penguin -ostrich -emu bat bee wasp butterfly moth dragonfly mosquito
        aircraft""",
        """penguin ostrich emu mammal -bat -squirrel fish arachnid reptile amphibian mollusc
        crustacean @plants @foods @household vehicle boat building metal rock gemstone""",
    ),
    "has feathers": (
        "bird",
        """mammal fish insect arachnid reptile amphibian mollusc crustacean @plants @foods tool
        utensil appliance device vehicle boat building @stuff planet""",
    ),
    "has a beak": (
        "bird platypus",
        """mammal -platypus -dolphin -whale insect arachnid amphibian crustacean reptile
        -tortoise @plants @foods @household -instrument @stuff @transport""",
    ),
    "lays eggs": (
        """bird trout salmon tuna cod goldfish herring carp pike insect spider tarantula tick
        crocodile alligator gecko tortoise frog toad newt platypus snail octopus""",
        "mammal -platypus scorpion @plants @foods @lifeless",
    ),
    "feeds babies with milk": (
        "mammal",
        """fish -shark insect -cockroach amphibian reptile mollusc crustacean sparrow eagle hawk
        owl duck swan crow @plants vegetable @lifeless""",
    ),
    "has gills": ("fish", "mammal bird reptile insect @plants fruit vegetable @lifeless"),
    "lives in water": (
        "fish whale dolphin clam oyster mussel octopus lobster shrimp prawn",
        """mammal -whale -dolphin -platypus slug arachnid bee wasp butterfly moth ant cockroach
        robin sparrow eagle hawk owl parrot pigeon crow raven canary swallow chicken ostrich
        emu cobra gecko lizard tortoise tree @artefacts -boat metal""",
    ),
    "has six legs": (
        "insect",
        """mammal bird fish arachnid reptile amphibian mollusc crustacean @plants @foods tool
        utensil appliance @transport @stuff garment""",
    ),
    "has eight legs": (
        "arachnid",
        """mammal bird fish insect reptile amphibian snail clam slug oyster @plants @foods tool
        utensil appliance @transport @stuff garment""",
    ),
    "has four legs": (
        """dog cat horse cow sheep goat pig lion tiger wolf fox leopard rabbit mouse squirrel
        bear elephant giraffe zebra camel platypus lizard gecko crocodile alligator tortoise
        amphibian""",
        """whale dolphin snake cobra bird fish insect arachnid mollusc crustacean @plants @foods
        tool utensil @transport @stuff garment""",
    ),
    "has two legs": (
        "bird",
        """dog cat horse cow sheep goat pig lion tiger wolf rabbit mouse fish insect arachnid
        snake lizard crocodile tortoise whale dolphin elephant giraffe mollusc crustacean
        @plants @foods @transport @stuff""",
    ),
    "has fur": (
        """dog cat horse cow goat lion tiger wolf fox leopard rabbit mouse squirrel bear giraffe
        zebra camel monkey kangaroo bat platypus""",
        """whale dolphin bird fish reptile amphibian mollusc crustacean ant beetle grasshopper
        ladybird scorpion @plants tool utensil appliance device @transport @stuff -fabric
        -material""",
    ),
    "has scales": (
        "fish -shark snake cobra lizard gecko crocodile alligator",
        """mammal frog toad newt salamander slug snail octopus bee wasp ant spider tarantula
        tree tool -wrench appliance @transport building metal gas""",
    ),
    "has a shell": (
        "snail clam oyster mussel tortoise crustacean",
        """octopus slug mammal bird fish bee wasp moth butterfly spider tarantula snake cobra
        lizard gecko amphibian tree flower furniture garment tool stationery""",
    ),
    "has a backbone": (
        "mammal bird fish -shark reptile amphibian",
        "insect arachnid mollusc crustacean @plants @foods tool utensil appliance lamp vehicle gas",
    ),
    "is warm-blooded": (
        "mammal bird",
        """reptile amphibian fish -tuna -shark mollusc crustacean arachnid ant beetle
        grasshopper cockroach @plants @lifeless""",
    ),
    "eats grass": (
        "cow sheep horse goat zebra rabbit",
        """lion tiger wolf leopard whale dolphin bat fox eagle hawk owl penguin seagull shark
        cod snake cobra crocodile spider scorpion mosquito bee wasp octopus @plants @foods
        @lifeless""",
    ),
    "hunts other animals": (
        """lion tiger wolf fox leopard eagle hawk owl shark pike crocodile alligator cobra snake
        spider tarantula scorpion""",
        """cow sheep goat horse zebra rabbit giraffe camel elephant pigeon snail slug butterfly
        moth oyster clam mussel @plants @foods @lifeless""",
    ),
    "has a sting": (
        "bee wasp scorpion",
        """mammal -platypus bird reptile amphibian trout salmon cod goldfish herring butterfly
        moth ladybird beetle grasshopper dragonfly snail clam slug tree fruit vegetable
        @lifeless""",
    ),
    "spins a web": (
        "spider",
        """mammal bird fish reptile amphibian mollusc crustacean insect scorpion tick @plants
        @foods @lifeless""",
    ),
    "has stripes": (
        "zebra tiger bee wasp",
        """elephant bear camel lion cow wolf whale dolphin crow raven swan flamingo shark ant
        @plants metal gas tool""",
    ),
    "has a tail": (
        """dog cat horse cow sheep goat pig lion tiger wolf fox leopard mouse squirrel zebra
        giraffe elephant camel kangaroo whale dolphin fish snake lizard crocodile""",
        """bee wasp ant beetle ladybird mosquito spider tarantula tick frog toad clam oyster
        octopus tree flower furniture building metal fruit tool""",
    ),
    "can swim": (
        """fish duck swan penguin whale dolphin frog crocodile alligator newt dog platypus bear
        octopus""",
        """sparrow canary robin bee wasp butterfly moth ladybird tortoise scorpion tree flower
        fruit vegetable @household vehicle building metal rock""",
    ),
    "can hop": (
        "kangaroo rabbit frog toad grasshopper",
        """elephant whale dolphin cow fish snake cobra crocodile snail slug clam oyster bee ant
        spider tree flower @household vehicle building""",
    ),
    "comes out at night": (
        "owl bat moth",
        """cow sheep horse chicken pigeon bee butterfly duck swan tree fruit vegetable furniture
        tool vehicle""",
    ),
    # plants and food
    "has leaves": (
        "oak birch maple willow elm beech flower lettuce cabbage spinach",
        """@animals metal gas rock gemstone tool utensil appliance device garment vehicle
        aircraft boat""",
    ),
    "has roots": (
        "tree flower",
        "@animals sweet drink @household @transport metal gas rock gemstone",
    ),
    "stays green all winter": (
        "pine fir spruce",
        "oak birch maple willow elm beech @animals metal gas rock tool building vehicle",
    ),
    "grows on trees": (
        "apple cherry pear peach plum apricot lemon lime orange",
        """strawberry raspberry melon vegetable @animals sweet drink @artefacts metal gas rock
        gemstone""",
    ),
    "grows under the ground": (
        "carrot potato radish turnip beetroot",
        """cabbage lettuce spinach broccoli pea cauliflower fruit @animals sweet drink
        @artefacts gas fabric""",
    ),
    "is good to eat": (
        "fruit vegetable sweet",
        "@lifeless dog cat bat spider scorpion wasp mosquito",
    ),
    "can be drunk": (
        "drink",
        """@living sweet vegetable -beetroot -carrot @artefacts rock gemstone fabric material
        gas gold iron steel mercury lead planet""",
    ),
    "contains alcohol": (
        "beer wine",
        "water milk tea coffee lemonade cola @animals vegetable fruit @artefacts metal rock",
    ),
    "tastes sweet": (
        "sweet banana pear peach plum melon apricot strawberry lemonade cola",
        """lemon lime spinach cabbage leek radish lettuce broccoli water wine beer @artefacts
        metal gas rock gemstone fabric material @plants""",
    ),
    "tastes sour": (
        "lemon lime",
        "banana pear melon sweet water milk potato carrot pea lettuce cola @artefacts rock fabric",
    ),
    "has a stone inside": (
        "cherry peach plum apricot",
        """apple banana lemon lime orange pear grape strawberry raspberry melon vegetable sweet
        drink garment gas @animals""",
    ),
    # things people make
    "can be worn": (
        "garment",
        """@animals tree @foods tool utensil appliance furniture instrument @transport building
        gas planet rock stationery""",
    ),
    "is worn on the feet": (
        "shoe boot sock sandal slipper",
        """garment -shoe -boot -sock -sandal -slipper @animals @foods tool utensil furniture
        instrument @transport building metal gas gemstone""",
    ),
    "is worn on the head": (
        "hat cap bonnet beret",
        """shirt coat dress sweater skirt shoe boot sock sandal slipper glove mitten @animals
        @foods tool furniture instrument @transport building gas""",
    ),
    "is worn on the hands": (
        "glove mitten",
        """shirt coat dress sweater skirt hat cap bonnet beret shoe boot sock sandal slipper
        scarf @animals @foods tool furniture instrument @transport building gas""",
    ),
    "makes music": (
        "instrument",
        """fish arachnid reptile mollusc crustacean @plants @foods tool utensil furniture
        garment stationery publication @transport @stuff planet""",
    ),
    "has strings": (
        "guitar violin cello harp banjo",
        """flute trumpet clarinet trombone saxophone drum tambourine @animals fruit sweet drink
        tool utensil appliance lamp furniture @transport building metal gas""",
    ),
    "is played by blowing": (
        "flute trumpet clarinet trombone saxophone",
        """piano guitar violin cello harp banjo drum tambourine @animals @plants @foods tool
        utensil appliance furniture garment @transport metal""",
    ),
    "has wheels": (
        "vehicle",
        """boat @animals @plants @foods utensil lamp garment instrument building metal gas rock
        gemstone fabric stationery publication""",
    ),
    "has an engine": (
        "vehicle -bicycle -tricycle ferry motorboat tugboat airplane helicopter jet airship",
        """bicycle tricycle canoe kayak rowboat glider @living @foods utensil furniture garment
        instrument stationery publication metal gas rock""",
    ),
    "has pedals": (
        "bicycle tricycle",
        """boat -kayak airship @living @foods utensil furniture garment metal gas rock tool lamp
        flute trumpet violin guitar""",
    ),
    "carries people": (
        "@transport",
        """insect fish bird arachnid amphibian mollusc crustacean reptile @plants @foods tool
        utensil appliance device lamp garment instrument stationery publication metal gas
        rock gemstone fabric""",
    ),
    "travels on water": (
        "boat",
        """vehicle aircraft @plants @foods tool utensil appliance device lamp furniture garment
        instrument building metal gas rock mammal reptile -crocodile -alligator arachnid""",
    ),
    "travels on roads": (
        "vehicle -tractor",
        "boat aircraft @living @foods @household building metal gas rock planet",
    ),
    "is used for cutting": (
        "saw axe knife",
        """hammer screwdriver rake broom spoon cup bowl plate ladle whisk @living @foods
        furniture garment instrument @transport building gas fabric lamp device""",
    ),
    "is used for digging": (
        "shovel spade",
        """hammer saw screwdriver wrench broom drill @living @foods plate cup whisk appliance
        device lamp furniture garment instrument boat aircraft building gas fabric""",
    ),
    "needs electricity": (
        "appliance device spotlight streetlight",
        """candle spoon fork knife plate cup bowl ladle hammer saw axe shovel spade rake broom
        @living @foods garment violin harp flute trumpet drum furniture canoe kayak rowboat
        sailboat stationery publication rock gas gemstone fabric""",
    ),
    "keeps food cold": (
        "fridge freezer",
        """oven toaster microwave dishwasher hairdryer vacuum_cleaner device lamp tool furniture
        garment instrument stationery publication @living boat aircraft fabric""",
    ),
    "heats food": (
        "oven toaster microwave",
        """fridge freezer dishwasher vacuum_cleaner tool furniture garment instrument stationery
        publication @living device boat aircraft fabric rock gemstone""",
    ),
    "gives light": (
        "lamp firefly lighthouse",
        """bee wasp ant beetle butterfly mammal bird reptile amphibian arachnid tree flower
        fruit vegetable tool utensil furniture garment instrument stationery publication barn
        rock fabric""",
    ),
    "is made for sitting on": (
        "chair armchair sofa stool bench",
        """table desk bookcase wardrobe cradle tool utensil appliance device lamp garment
        instrument stationery publication @living @foods gas rock""",
    ),
    "is made for sleeping in": (
        "bed cradle",
        """chair stool bench table desk bookcase wardrobe tool utensil appliance device lamp
        garment instrument stationery publication @living @foods metal gas rock bicycle""",
    ),
    "has a roof": (
        "building",
        """@living @foods tool utensil device lamp garment instrument stationery publication
        metal gas gemstone furniture bicycle motorcycle canoe kayak rowboat""",
    ),
    "can be read": (
        "publication",
        """@living @foods tool utensil appliance lamp furniture garment instrument @transport
        building metal gas rock gemstone fabric""",
    ),
    "is used for writing": (
        "pen pencil crayon marker",
        """eraser ruler stapler paperclip tool utensil appliance lamp furniture garment
        instrument @transport building mammal fish insect reptile @foods gas fabric""",
    ),
    # matter
    "conducts electricity well": (
        "metal",
        "fabric rock -coal gemstone material fruit tree garment publication",
    ),
    "sticks to a magnet": (
        "iron steel",
        """gold silver copper lead tin aluminium mercury platinum gas gemstone fabric material
        @living @foods garment publication""",
    ),
    "can rust": (
        "iron steel",
        """gold silver platinum aluminium lead gas gemstone fabric material @living @foods
        garment publication""",
    ),
    "is liquid at room temperature": (
        "drink mercury",
        "metal -mercury gas gemstone rock fabric material tree @household @transport building",
    ),
    "is a precious metal": (
        "gold silver platinum",
        "iron steel copper lead tin aluminium gas gemstone rock fabric material @living @foods",
    ),
    "is used for making clothes": (
        "fabric leather",
        """metal gas rock gemstone glass wood cardboard paper furniture utensil tool @foods
        building planet""",
    ),
    "goes around the Sun": ("planet", "@living @foods @artefacts @stuff"),
    # the world
    "is in Europe": (
        "France Spain Italy Germany Poland Greece",
        "country -France -Spain -Italy -Germany -Poland -Greece planet",
    ),
    "is in Asia": (
        "Japan China India Thailand Vietnam",
        "country -Japan -China -India -Thailand -Vietnam planet",
    ),
    "is in Africa": (
        "Kenya Nigeria Ghana Ethiopia",
        "country -Kenya -Nigeria -Ghana -Ethiopia planet",
    ),
    "is in South America": (
        "Brazil Peru Chile Argentina",
        "country -Brazil -Peru -Chile -Argentina planet",
    ),
    "is played with a ball": (
        "football tennis basketball volleyball golf cricket",
        "swimming boxing judo skiing skating cycling rowing job @animals vegetable furniture",
    ),
    "takes place in or on water": ("swimming rowing", "sport -swimming -rowing job"),
    "cares for sick people": (
        "doctor nurse surgeon",
        "teacher baker farmer pilot plumber carpenter tailor barber sport",
    ),
    "works with wood": (
        "carpenter",
        "doctor nurse surgeon teacher baker pilot plumber tailor barber",
    ),
}
for _colour, _things in COLOURS.items():
    _others = " ".join(things for colour, things in COLOURS.items() if colour != _colour)
    PROPERTIES[f"is {_colour}"] = (_things, _others)

PLURALS = {
    "potato": "potatoes",
    "scarf": "scarves",
    "goldfish": "goldfish",
    "fish": "fish",
    "wolf": "wolves",
    "mouse": "mice",
    "sheep": "sheep",
    "trout": "trout",
    "salmon": "salmon",
    "cod": "cod",
    "herring": "herring",
    "carp": "carp",
    "pike": "pike",
    "knife": "knives",
    "octopus": "octopuses",
    "aircraft": "aircraft",
    "shrimp": "shrimps",
    "tuna": "tuna",
    "radio": "radios",
    "piano": "pianos",
    "cello": "cellos",
    "banjo": "banjos",
}


def _words(text):
    return [word.replace("_", " ") for word in text.split()]


THINGS = {}  # thing -> kind
MASS = set()  # things named without an article
for _kind, (_, _text) in KINDS.items():
    for _name in _words(_text):
        if _name.startswith("*"):
            MASS.add(_name := _name[1:])
        if _name in THINGS:
            raise ValueError(f"{_name} is both a {THINGS[_name]} and a {_kind}")
        THINGS[_name] = _kind


def select(text):
    """The things that a list of words stands for, in the order of the tables."""
    chosen = set()
    for word in _words(text):
        remove, word = word.startswith("-"), word.lstrip("-")
        if word.startswith("@"):
            found = set(select(GROUPS[word[1:]]))
        elif word in KINDS and word not in THINGS:
            found = {thing for thing, kind in THINGS.items() if kind == word}
        elif word in THINGS:
            found = {word}
        else:
            raise ValueError(f"{word!r} is no thing, kind or group of this world")
        chosen = chosen - found if remove else chosen | found
    return [thing for thing in THINGS if thing in chosen]


HAVE = {name: select(yes) for name, (yes, _) in PROPERTIES.items()}
LACK = {name: select(no) for name, (_, no) in PROPERTIES.items()}
_HAVE = {name: frozenset(things) for name, things in HAVE.items()}
_LACK = {name: frozenset(things) for name, things in LACK.items()}
for _name in PROPERTIES:
    if _both := _HAVE[_name] & _LACK[_name]:
        raise ValueError(f"{_name!r} is said to be both true and false of {sorted(_both)}")


def truth(name, thing):
    """True, False, or None where the world does not say."""
    return True if thing in _HAVE[name] else False if thing in _LACK[name] else None


def article(noun):
    """robin -> a robin, oak -> an oak, gold -> gold, furniture -> a piece of furniture."""
    if noun in MASS:
        return noun
    if noun in ("furniture", "stationery"):
        return f"a piece of {noun}"
    return f"an {noun}" if noun[0] in "aeio" or noun.startswith("um") else f"a {noun}"


def plural(noun):
    """robin -> robins, wolf -> wolves, gold -> gold; a kind's plural is the one in its table."""
    if noun in KINDS and noun not in THINGS:
        return KINDS[noun][0]
    if noun in MASS:
        return noun
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "ss")) else "s")


def say(name, is_true=True, many=False):
    """A property as a predicate: lays eggs, does not lay eggs, lay eggs, do not lay eggs."""
    verb, _, rest = name.partition(" ")
    if verb == "can":
        return f"{'can' if is_true else 'cannot'} {rest}"
    if verb == "is":
        return f"{'are' if many else 'is'}{'' if is_true else ' not'} {rest}"
    base = {"has": "have", "carries": "carry", "goes": "go"}.get(verb, verb[:-1])
    if is_true:
        return f"{base if many else verb} {rest}"
    return f"{'do' if many else 'does'} not {base} {rest}"


def rule(name, kind):
    """What holds of a kind: (truth, "all" or "most"), or (None, "") where the kind is divided.

    >>> rule("has feathers", "bird"), rule("can fly", "bird"), rule("is yellow", "fruit")
    ((True, 'all'), (True, 'most'), (None, ''))
    """
    values = [truth(name, thing) for thing, its_kind in THINGS.items() if its_kind == kind]
    for value in (True, False):
        share = values.count(value) / len(values)
        if share == 1:
            return value, "all"
        if share >= 0.75:
            return value, "most"
    return None, ""


def main():
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    print(f"{len(THINGS)} things, {len(KINDS)} kinds, {len(PROPERTIES)} properties")
    for name in PROPERTIES:
        print(f"{name}: {len(HAVE[name])} yes, {len(LACK[name])} no")
        print(f"   yes: {', '.join(HAVE[name])}")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except OSError as e:  # `| head -1`, which has read enough, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(e, BrokenPipeError):
            print(f"error: {e.strerror}", file=sys.stderr)
            sys.exit(2)
