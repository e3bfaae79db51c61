"""The words that keys and lists are made of: short, common, lower case, none longer than eight letters."""

_ADJECTIVES = """able acid aged airy amber ample apt arid azure bald basic best big bitter black bland blind blue blunt bold brave brief
bright brisk broad brown busy calm cheap chief chilly civil clean clear clever cold cosy crisp cruel curly daily damp dark
dear deep dense dim dirty dizzy dry dual dull eager early easy empty even exact fair faint false fancy fast fat few fine firm
first fit flat fond frail free fresh full funny gentle giant glad good grand grave gray great green grim gross happy hard
harsh hasty heavy high hollow honest hot huge humble icy idle inner jolly keen kind large last late lazy lean light little
lively lone long loose loud low loyal lucky mad main major mean meek mellow merry mild minor misty modern moist mute naive
narrow neat new nice noble noisy odd old open oral oval pale past plain polite poor prime proud pure quick quiet rapid rare
raw ready real rich ripe rigid robust rosy rough round royal rude rural rusty sad safe salty scarce second secret serene
shaky sharp short shy silent silly simple single slim slow small smart smooth snowy sober soft solid sour spare steep stiff
still stormy strict strong subtle sunny sweet swift tall tame tart tasty tender thick thin tidy tight tiny tired tough
true urban vague vast vital vivid warm wary weak weary wet white whole wide wild windy wise witty wooden young zesty"""

_NOUNS = """acorn actor anchor angle ankle apple apron arrow atlas attic aunt badge bag baker ball bamboo banjo bank barn basil basin
basket bath beach bead beam bean bear beard bed bee beetle bell belt bench berry bike bird blade block board boat bone book
boot bottle bowl box brain branch bread brick bridge broom brush bucket bus bush butter button cabin cable cactus cake camel
camera camp canal candle canoe canyon card cargo carpet carrot cart castle cat cattle cave cedar chain chair chalk cheese
cherry chest chin circle city clay cliff clock cloud clover coach coal coast coat coin comb copper coral corn couch crab
crane crater cream creek crow crown cup curtain daisy dawn deer desert desk diamond dinner doctor dog door dragon drum duck
eagle ear earth east elbow engine fabric falcon farm father feather fence fern ferry field finger fire fish flag flame flute
foam fog forest fork fort fossil fox frame frog fruit galaxy garden garlic gate ghost ginger giraffe glass globe glove goat
gold goose grape grass guitar hammer harbor harp hat hawk hedge helmet hen hill honey hook horn horse hotel house ink iris
iron island ivory jacket jaguar jar jelly jewel judge jungle kettle key king kite kitten knee knife ladder lake lamp lantern
lava leaf leg lemon lentil library lily lime lion lizard lobster lock lotus lung magnet maple marble market mask meadow medal
melon metal mill mirror mole monkey moon moss moth mountain mouse museum needle nest net night north nose nut oak oar oasis
ocean olive onion opal orange orchid otter oven owl oyster paddle palace palm panda paper parrot path peach peanut pear pearl
pebble pen pencil pepper phone piano pickle pig pillow pilot pine pirate planet plate plum pocket poem pond pony poppy potato
pump puppet pyramid queen quilt rabbit radio raft rail rain raven ribbon rice ring river road robin rocket roof room root rope
rose ruby sail salad salmon salt sand saturn scarf school seal seed shark sheep shelf ship shirt shoe shop silk silver singer
skirt sky slipper snail snake snow soap sofa spider spoon spring squid star stone storm stove sugar summer sun swan table
tail tea temple tent thumb tiger timber toast tomato tower town train tree truck trumpet tulip tunnel turtle uncle valley
vase velvet village vine violet violin wagon wall walnut water wave whale wheat wheel whisper window wing winter wolf wood
wool yacht yard zebra"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
PLAIN = tuple(sorted(set(ADJECTIVES) | set(NOUNS)))
UNMISTAKABLE = frozenset(word for word in PLAIN if sum(word in other for other in PLAIN) == 1)
