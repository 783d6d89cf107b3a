"""Words of the pocket tokenizer beside those of its world, so that new domains do not start from single letters."""

WORDS = tuple(
    """
    image picture photo scan view item product object thing person man woman child dog cat bird car tree house
    food table water grass sky street room door window face hand head body skin eye mouth hair foot leg arm
    shirt dress pants skirt shoes hat jacket coat sock bag sleeve collar button fabric cloth price tag label
    sale size medium big tiny short long wide narrow thin thick tall round oval flat sharp smooth rough
    irregular regular clear blurred bright dark light pale warm cold new old good bad true false yes no none
    normal abnormal lesion mass nodule tumor cell cells lung heart brain bone chest breast liver kidney tissue
    margin border edge shape side left right upper lower top bottom middle center front back inside outside
    present absent visible hidden benign malignant positive negative finding disease healthy patient doctor
    zero one two three four five six seven eight nine ten many few some all more less most least first second
    last next before after above below between near far same different other than with without of in on at to
    from by for and or not is are was be has have do does can will the this that these those it its their what
    which who where when why how much type kind name number count color pattern material cotton wool leather
    striped dotted checked plain solid floral print logo red orange yellow green blue purple pink brown black
    white gray beige navy gold silver day night summer winter morning time week month year text word letter
    line point dot curve square circle triangle star cross ring diamond moon box ball cup bottle book phone
    """.split()
)
