
BweightJ(ˆ,¿=qy¿!âs?<a?¾Bv>oÅ¾“ç¹>
ÏI?ÞõÐ?U*À?